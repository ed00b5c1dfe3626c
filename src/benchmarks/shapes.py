"""The shapes that benchmarks know by name: the paper's models (arXiv:2503.15798, Table 2), and a small one."""

from src.model import ModelConfig

_SIZES = {  # layers, hidden size, heads
    "small": (2, 256, 4),
    "160m": (12, 768, 12),
    "410m": (24, 1024, 16),
    "1b": (16, 2048, 8),
}
SHAPES = tuple(f"{size}-{experts}e" for size in _SIZES for experts in (4, 16))
PAPER_VOCABULARY = 50304


def model_config(shape: str, vocab_size: int = PAPER_VOCABULARY) -> ModelConfig:
    """Return the MoLE model of a name in `SHAPES`; its FFNs are four times as wide as the hidden size."""
    size, experts = shape.split("-")
    num_layers, hidden_size, num_heads = _SIZES[size]
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        intermediate_size=4 * hidden_size,
        num_experts=int(experts.removesuffix("e")),
        expert_intermediate_size=4 * hidden_size,
    )
