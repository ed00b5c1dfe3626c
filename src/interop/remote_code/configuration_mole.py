"""Configuration of a Mixture of Lookup Experts (arXiv:2503.15798), of a mixture of experts or of a dense model."""

from typing import Any

from transformers import PretrainedConfig


class MoleConfig(PretrainedConfig):
    """Sizes and switches of `MoleForCausalLM`; they name what was trained and are not meant to be changed.

    Args:
        vocab_size: rows of the embedding and of the table.
        hidden_size: width of the residual stream.
        num_hidden_layers: decoder blocks.
        num_attention_heads: heads of queries.
        num_key_value_heads: heads of keys and values, each shared by as many heads of queries.
        head_dim: values per head.
        intermediate_size: width of the FFN that every token takes; 0 for none.
        hidden_act: `gelu` (exact, two matrices) or `swiglu` (three).
        num_experts: routed experts in each block that has some; 0 in a dense model.
        expert_layers: blocks that have experts; None for all.
        null_expert: whether routers have one more choice, which adds nothing.
        expert_intermediate_size: width of each of them.
        expert_input: `embedding`, whose outputs are in the table `lut/`, or `hidden`, which are weights.
        expert_ids: `all`, or `seen`, where the table lacks ids for which the experts add nothing.
        num_experts_per_tok: experts that a token mixes; None for all of them.
        max_position_embeddings: longest sequence that was trained.
        rope_theta: base of the rotary embedding.
        llama3_rope_scaling: Llama 3's four numbers, or None.
        attention_bias: whether the projections of queries, keys and values have biases.
        qk_norm: whether each head's queries and keys are normed.
        rms_norm_eps: added to the mean square in norms.
        initializer_range: standard deviation of new weights.
        tie_word_embeddings: whether the vocabulary head is the embedding.
        backbone: SHA-256 of the weights that the table belongs to; None without a table.
        kwargs: what transformers knows of any model.
    """

    model_type = "mole"
    keys_to_ignore_at_inference = ("cache", "past_key_values")

    def __init__(
        self,
        vocab_size: int = 4096,
        hidden_size: int = 256,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 4,
        head_dim: int = 64,
        intermediate_size: int = 1024,
        hidden_act: str = "gelu",
        num_experts: int = 4,
        expert_layers: list[int] | None = None,
        null_expert: bool = False,
        expert_intermediate_size: int = 1024,
        expert_input: str = "embedding",
        expert_ids: str = "all",
        num_experts_per_tok: int | None = None,
        max_position_embeddings: int = 2048,
        rope_theta: float = 10000.0,
        llama3_rope_scaling: dict[str, float] | None = None,
        attention_bias: bool = False,
        qk_norm: bool = False,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        backbone: str | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.num_experts = num_experts
        self.expert_layers = expert_layers
        self.null_expert = null_expert
        self.expert_intermediate_size = expert_intermediate_size
        self.expert_input = expert_input
        self.expert_ids = expert_ids
        self.num_experts_per_tok = num_experts_per_tok
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.llama3_rope_scaling = llama3_rope_scaling
        self.attention_bias = attention_bias
        self.qk_norm = qk_norm
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.backbone = backbone
        self.use_cache = use_cache
        options: dict[str, Any] = {**kwargs, "tie_word_embeddings": tie_word_embeddings}
        super().__init__(**options)

    @property
    def mixture_layers(self) -> list[int]:
        """Blocks that have experts, in the order of the table's layers."""
        every = list(range(self.num_hidden_layers if self.num_experts else 0))
        return every if self.expert_layers is None else self.expert_layers

    @property
    def has_table(self) -> bool:
        """Whether the experts read the token's embedding, so that their outputs are in the table."""
        return self.num_experts > 0 and self.expert_input == "embedding"
