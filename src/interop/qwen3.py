"""Qwen3's folders: Llama's block with norms of queries and keys, and Qwen2's windows. Its MoE is another family."""

from src.interop.blocks import SUPPORTED, BlockFamily, Setting
from src.interop.huggingface import register_blocks
from src.interop.llama import LAYER_NAMES
from src.interop.qwen2 import QWEN_SETTINGS, refuse_layers

QWEN3 = BlockFamily(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    settings={**QWEN_SETTINGS, "head_dim": Setting("head_dim", int, 128, may_be_null=True)},
    layer_names={
        **LAYER_NAMES,
        "attention.query_norm.weight": "self_attn.q_norm.weight",
        "attention.key_norm.weight": "self_attn.k_norm.weight",
    },
    block={"activation": "swiglu", "attention_bias": False, "qk_norm": True},
    supported={**SUPPORTED, "attention_bias": False},  # which also gives `o_proj` one
    refuse=refuse_layers,
)

register_blocks(QWEN3)
