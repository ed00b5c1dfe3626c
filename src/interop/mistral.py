"""Mistral's folders: Llama's block, with a sliding window that is in use where sequences may be longer."""

from src.errors import CheckpointError
from src.interop.blocks import SUPPORTED, BlockFamily, Setting, Values
from src.interop.huggingface import register_blocks
from src.interop.llama import LAYER_NAMES, SETTINGS

POSITIONS = Setting("max_position_embeddings", int, 4096 * 32)
WINDOW = Setting("sliding_window", int, 4096, may_be_null=True)


def refuse_window(values: Values, where: str) -> None:
    """Raise CheckpointError for a window that some sequence could be longer than."""
    window, positions = WINDOW.read(values, where), POSITIONS.read(values, where)
    if window is not None and positions > window:
        raise CheckpointError(
            f"{where}: sliding_window is {window}, and max_position_embeddings is {positions}, but only sequences "
            "within one window are supported here; lower max_position_embeddings to the window, if that is enough"
        )


MISTRAL = BlockFamily(
    model_type="mistral",
    architecture="MistralForCausalLM",
    settings={
        **SETTINGS,
        "num_kv_heads": Setting("num_key_value_heads", int, 8, may_be_null=True),
        "max_sequence_length": POSITIONS,
    },
    layer_names=LAYER_NAMES,
    block={"activation": "swiglu", "attention_bias": False, "qk_norm": False},
    supported={**SUPPORTED, "layer_types": None},
    refuse=refuse_window,
)

register_blocks(MISTRAL)
