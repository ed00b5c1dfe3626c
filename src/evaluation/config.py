"""What is measured when a fit ends."""

from dataclasses import dataclass

from src.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The evaluation callback."""

    at_fit_end: bool = True
    """Score both forms on the held-out windows when training is done."""
    batch_size: int = 16
    """Windows per forward pass."""
    sample_prompt: str = "def "
    """Text that the final sample continues; empty generates none."""
    sample_tokens: int = 96
    """Tokens of the sample."""
    sample_temperature: float = 0.8
    """Temperature of the sample; 0 is greedy."""

    def __post_init__(self) -> None:
        """Raise ConfigError on values out of range."""
        if self.batch_size < 1:
            raise ConfigError(f"evaluation.batch_size: {self.batch_size}, but it must be at least 1")
        for name in ("sample_tokens", "sample_temperature"):
            if getattr(self, name) < 0:
                raise ConfigError(f"evaluation.{name}: {getattr(self, name)}, but it must not be negative")
