"""Qwen2's and Qwen2.5's folders: Llama's block with biases of queries, keys and values, and windows in some layers."""

from src.errors import CheckpointError
from src.interop.blocks import SUPPORTED, BlockFamily, Setting, Values
from src.interop.huggingface import register_blocks
from src.interop.llama import LAYER_NAMES, SETTINGS

POSITIONS = Setting("max_position_embeddings", int, 32768)
WINDOW = Setting("sliding_window", int, 4096, may_be_null=True)
SWITCH = Setting("use_sliding_window", bool, False)
FULL_LAYERS = Setting("max_window_layers", int, 28)
QWEN_SETTINGS = {
    **SETTINGS,
    "num_kv_heads": Setting("num_key_value_heads", int, 32, may_be_null=True),
    "max_sequence_length": POSITIONS,
}


def refuse_layers(values: Values, where: str) -> None:
    """Raise CheckpointError for layers whose sliding window some sequence could be longer than."""
    kinds = values.get("layer_types")
    window = WINDOW.read(values, where) if SWITCH.read(values, where) else None
    if isinstance(kinds, list):
        if others := sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"}):
            raise CheckpointError(f"{where}: layer_types has {others[0]!r}, but only full attention is supported here")
        slides = "sliding_attention" in kinds
    else:
        slides = FULL_LAYERS.read(values, where) < SETTINGS["num_layers"].read(values, where)
    if slides and window is not None and POSITIONS.read(values, where) > window:
        raise CheckpointError(
            f"{where}: use_sliding_window is True, with sliding_window {window} in some layers, but only sequences "
            "within one window are supported here; lower max_position_embeddings to the window, if that is enough"
        )


QWEN2 = BlockFamily(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    settings=QWEN_SETTINGS,
    layer_names=LAYER_NAMES,
    block={"activation": "swiglu", "attention_bias": True, "qk_norm": False},
    supported=SUPPORTED,
    refuse=refuse_layers,
)

register_blocks(QWEN2)
