"""Llama's folders: Llama, SmolLM, TinyLlama and all with `model_type` llama. Other families are variations of it."""

from src.interop.blocks import SUPPORTED, BlockFamily, Setting
from src.interop.huggingface import register_blocks

SETTINGS = {
    "vocab_size": Setting("vocab_size", int),
    "hidden_size": Setting("hidden_size", int),
    "num_layers": Setting("num_hidden_layers", int),
    "num_heads": Setting("num_attention_heads", int),
    "num_kv_heads": Setting("num_key_value_heads", int, None, may_be_null=True),
    "head_dim": Setting("head_dim", int, None, may_be_null=True),
    "intermediate_size": Setting("intermediate_size", int),
    "max_sequence_length": Setting("max_position_embeddings", int, 2048),
    "norm_eps": Setting("rms_norm_eps", float, 1e-6),
    "init_std": Setting("initializer_range", float, 0.02),
    "tie_embeddings": Setting("tie_word_embeddings", bool, False),
}
LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "shared_expert.gate.weight": "mlp.gate_proj.weight",
    "shared_expert.up.weight": "mlp.up_proj.weight",
    "shared_expert.down.weight": "mlp.down_proj.weight",
}
LLAMA = BlockFamily(
    model_type="llama",
    architecture="LlamaForCausalLM",
    settings=SETTINGS,
    layer_names=LAYER_NAMES,
    block={"activation": "swiglu", "attention_bias": False, "qk_norm": False},
    supported={**SUPPORTED, "attention_bias": False, "mlp_bias": False},  # which also give `o_proj` and `mlp` biases
)

register_blocks(LLAMA)
