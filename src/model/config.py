"""The shape of a model. One config describes Dense, MoE and MoLE; knows nothing of data and optimizers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

from src.errors import ConfigError, check_range

Architecture = Literal["dense", "moe", "mole"]
Activation = Literal["gelu", "swiglu"]
_OF_MOLE: dict[str, object] = {
    "expert_permutation": None,
    "shared_expert_row": False,
    "expert_layers": None,
    "null_expert": False,
    "expert_ids": "all",
}
"""Keys that only experts that read embeddings can have, and the value that says nothing."""
OF_TRAINING = ("expert_execution", "gradient_checkpointing")
"""Keys of `ModelConfig` that say how to compute, not what."""
_MAX_SIZE = 2**20
"""So that the bytes of any tensor can be counted in 63 bits."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's scaling of the rotary embedding: low frequencies are divided by `factor`, high ones are kept."""

    factor: float = 8.0
    """What frequencies are divided by whose wavelength is longer than the original length / `low_freq_factor`."""
    low_freq_factor: float = 1.0
    """Between both factors, frequencies are interpolated; it is the smaller one."""
    high_freq_factor: float = 4.0
    """Frequencies are kept whose wavelength is shorter than the original length / `high_freq_factor`."""
    original_max_position_embeddings: int = 8192
    """The original length: the longest sequence, in tokens, before the embedding was scaled."""

    def __post_init__(self) -> None:
        prefix = "model.rope_scaling."
        check_range(self, prefix, ("factor",), at_least=1)
        check_range(self, prefix, ("low_freq_factor", "high_freq_factor"), above=0)
        check_range(self, prefix, ("original_max_position_embeddings",), at_least=1, at_most=2**31 - 1)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"{prefix}low_freq_factor: {self.low_freq_factor:g}, but it must be below {prefix}high_freq_factor "
                f"({self.high_freq_factor:g})"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of a `Transformer`.

    Dense: `num_experts` 0. MoLE: a shared expert plus experts that read the token embedding, all of them active.
    MoE: experts that read hidden states, `top_k` of them; in the paper without a shared expert (`intermediate_size` 0).
    Any combination of these settings is a model, such as the paper's ablations between MoE and MoLE. The defaults are
    the paper's block; Llama, Mistral and Qwen differ from it in attention, activation and the head.
    """

    vocab_size: int
    """V: rows of the embedding and of every lookup table; at least the tokenizer's size."""
    hidden_size: int
    """D: width of the residual stream."""
    num_layers: int
    """L: decoder blocks."""
    num_heads: int
    """H: attention heads; without a `head_dim` they must divide `hidden_size` into an even one (rotary)."""
    num_kv_heads: int | None = None
    """Heads of keys and values; divides `num_heads`. Each is shared by as many query heads (grouped-query attention).
    null: one per query head."""
    head_dim: int | None = None
    """K: values per head; even. null: `hidden_size / num_heads`."""
    intermediate_size: int
    """F: width of the always-on FFN (Dense's FFN, MoLE's shared expert); 0 for none (MoE)."""
    activation: Activation = "gelu"
    """Of FFN, shared expert and routed experts: `gelu` (exact, two matrices) or `swiglu` (SiLU of a gate, times a third
    matrix)."""
    num_experts: int = 0
    """E: routed experts in each layer that has some; 0 is a dense model."""
    expert_layers: list[int | str] | None = field(default=None, hash=False)
    """Layers that have experts that read embeddings, such as [0, 2], in ascending order; a table has as many.
    auto: every second one of the first two thirds, range(0, ceil(2 L / 3), 2). null: all."""
    null_expert: bool = False
    """Routers of experts that read embeddings choose among E + 1; the last choice adds nothing."""
    expert_intermediate_size: int = 0
    """Width of each routed expert's FFN; above 0 if `num_experts` is."""
    expert_input: Literal["embedding", "hidden"] = "embedding"
    """What routed experts read: `embedding` (MoLE; can become a table) or `hidden` (MoE; cannot)."""
    expert_permutation: int | None = None
    """Seed of a fixed permutation p of all ids: embedding experts of id i then read the embedding of p(i), so that rows
    are as many, but not tied to the token's own embedding (a control). null: they read that of i."""
    shared_expert_row: bool = False
    """Embedding experts of all ids read the embedding of id 0, so that all share one row (a control: what routers do
    without rows of their own)."""
    expert_ids: Literal["all", "seen"] = "all"
    """Ids for which embedding experts return something. `seen`: those of the training text; for all others they add
    nothing, and a table has no rows. Which those are is stored with the weights."""
    top_k: int | None = None
    """Routed experts per token, softmax after the choice; null activates all of them (MoLE).

    With 1 the weight is always 1, and only a load-balance loss or z-loss trains the router."""
    max_sequence_length: int = 2048
    """Longest sequence, in tokens, that training, evaluation and generation may use."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: RopeScaling | None = None
    """Llama 3's scaling of the rotary embedding for longer sequences; null: none."""
    attention_bias: bool = False
    """Biases of the query, key and value projections."""
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys, before the rotary embedding."""
    tie_embeddings: bool = False
    """The vocabulary head uses the weights of the embedding."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of initial weights (norms start at 1)."""
    scale_output_init: bool = True
    """Divide `init_std` by sqrt(2 * num_layers) for projections that write to the residual stream."""
    expert_execution: Literal["unique", "per_token", "unique_per_step"] = "unique"
    """How often embedding experts run in training; the gradients are the same. `unique`: once per distinct token id of
    a micro-batch. `per_token`: at every position, the paper's form. `unique_per_step`: once per distinct id of all
    micro-batches of an optimizer step, whose rows are kept for it."""
    gradient_checkpointing: bool = False
    """Recompute blocks and experts in the backward pass instead of storing their activations."""

    def __post_init__(self) -> None:
        check_range(self, "model.", ("vocab_size", "max_sequence_length"), at_least=1, at_most=2**31 - 1)
        heads = ("hidden_size", "num_heads", "num_kv_heads", "head_dim")
        check_range(self, "model.", heads, at_least=1, at_most=_MAX_SIZE)
        check_range(self, "model.", ("num_layers",), at_least=1, at_most=4096)
        optional = ("intermediate_size", "num_experts", "expert_intermediate_size")
        check_range(self, "model.", optional, at_least=0, at_most=_MAX_SIZE)
        check_range(self, "model.", ("init_std",), at_least=0)
        check_range(self, "model.", ("rope_theta", "norm_eps"), above=0)
        check_range(self, "model.", ("expert_permutation",), at_least=0, at_most=2**63 - 1)
        self._check_heads()
        self._check_expert_layers()
        if self.num_experts and not self.expert_intermediate_size:
            raise ConfigError(
                "model.expert_intermediate_size: 0, but model.num_experts is above 0; give each expert a width"
            )
        if not self.intermediate_size and len(self.mixture_layers) < self.num_layers:
            raise ConfigError("model.intermediate_size: 0 and no experts leave blocks without an FFN; set one of them")
        if self.top_k is not None and not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"model.top_k: {self.top_k}, but it must be in 1..num_experts ({self.num_experts}); null activates all"
            )

    def _check_expert_layers(self) -> None:
        """Check the keys of experts that read embeddings, and replace `auto` by the layers that it means."""
        for key, nothing in _OF_MOLE.items():
            if (value := getattr(self, key)) != nothing and self.architecture != "mole":
                raise ConfigError(
                    f"model.{key}: {value}, but this {self.architecture} model has no experts that read embeddings; "
                    f"set it to {'null' if nothing is None else str(nothing).lower()}"
                )
        if self.shared_expert_row and self.expert_permutation is not None:
            raise ConfigError(
                f"model.shared_expert_row: true, but model.expert_permutation is {self.expert_permutation}; a shared "
                "row has nothing to permute, so set one of them only"
            )
        if self.null_expert and self.top_k is not None:
            raise ConfigError(
                f"model.null_expert: true, but model.top_k is {self.top_k}; the null expert is one choice more among "
                "all experts, so set model.top_k to null"
            )
        if self.expert_layers is None:
            return
        every = list(range(self.num_layers))
        layers = every[: -(-2 * self.num_layers // 3) : 2] if self.expert_layers == ["auto"] else self.expert_layers
        if not layers or layers != [layer for layer in every if layer in layers]:
            raise ConfigError(
                f"model.expert_layers: {self.expert_layers}, but it must be layers in 0..{self.num_layers - 1}, in "
                "ascending order, such as [0, 2], or auto, or null for all of them"
            )
        object.__setattr__(self, "expert_layers", None if layers == every else layers)

    def _check_heads(self) -> None:
        if self.head_dim is None and self.hidden_size % (2 * self.num_heads):
            raise ConfigError(
                f"model.num_heads: {self.num_heads} heads do not divide model.hidden_size {self.hidden_size} "
                "into an even head dimension; change one of them"
            )
        if self.attention_head_dim % 2:
            raise ConfigError(f"model.head_dim: {self.head_dim}, but the rotary embedding needs an even number")
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"model.num_kv_heads: {self.num_kv_heads} heads of keys and values do not divide model.num_heads "
                f"{self.num_heads}; change one of them"
            )

    @property
    def rows_once_per(self) -> Literal["micro_batch", "step"] | None:
        """Of what embedding experts compute each distinct id once in training; None where they do not."""
        if self.architecture != "mole" or self.expert_execution == "per_token":
            return None
        return "micro_batch" if self.expert_execution == "unique" else "step"

    @property
    def architecture(self) -> Architecture:
        """`dense` without routed experts, `mole` when they read embeddings, `moe` when they read hidden states."""
        if not self.num_experts:
            return "dense"
        return "mole" if self.expert_input == "embedding" else "moe"

    @property
    def reads_own_embedding(self) -> bool:
        """Whether the embedding experts of an id read the embedding of that id, as in MoLE; False in controls."""
        return self.expert_permutation is None and not self.shared_expert_row

    @property
    def mixture_layers(self) -> tuple[int, ...]:
        """Layers that have routed experts, in order; layer i of a table, or of `experts`, is the i-th of them."""
        if not self.num_experts:
            return ()
        return tuple(range(self.num_layers) if self.expert_layers is None else map(int, self.expert_layers))

    @property
    def router_choices(self) -> int:
        """Logits of each router: one per expert, and one more for the null expert."""
        return self.num_experts + self.null_expert

    @property
    def attention_head_dim(self) -> int:
        """K: `head_dim`, or its default."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """G: `num_kv_heads`, or its default."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def active_experts(self) -> int:
        """Routed experts mixed into each token: `top_k`, or all of them."""
        return self.num_experts if self.top_k is None else self.top_k

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object], where: str) -> "ModelConfig":
        """Read the fields from plain values; unknown or missing keys raise ConfigError naming `where`."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"{where}: unknown model key {unknown[0]!r}; was it written by a newer version?")
        try:
            scaling = values.get("rope_scaling")
            if isinstance(scaling, Mapping):
                values = {**values, "rope_scaling": RopeScaling(**scaling)}
            return cls(**values)  # type: ignore[arg-type]
        except TypeError as error:
            raise ConfigError(f"{where}: incomplete model config ({error})") from error
