"""What is measured during a fit and at its end."""

from dataclasses import dataclass, field

from src.errors import ConfigError
from src.evaluation.held_out import EvaluationCorpus
from src.evaluation.tasks import find_task


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The evaluation callback."""

    at_fit_end: bool = True
    """Score both forms on the held-out windows when training is done."""
    every_validations: int | None = None
    """Score the training form on tasks and texts with every so many validations, too; null waits for the end."""
    tasks: list[str] = field(default_factory=lambda: ["next_passage", "repeated_word"])
    """Names of tasks; `python -m src.evaluate --help` lists them. Those of lm-eval need the extra `eval`."""
    task_limit: int | None = None
    """Documents of each task at most; null takes all (100 of those made of held-out text)."""
    local_data: str | None = None
    """Folder with the paper's tasks as <task>.<split>.jsonl or .jsonl.gz; null fetches them from the Hugging Face
    hub."""
    corpora: list[EvaluationCorpus] = field(default_factory=list[EvaluationCorpus])
    """Further texts to score, beside the held-out text; each has a `name` and `files`."""
    batch_size: int = 16
    """Windows per forward pass; tasks take as many tokens at a time."""
    dashboard: bool = True
    """With each validation, draw what the routers do into `figures/` and log it."""
    sample_prompt: str = "def "
    """Text that the final sample continues; empty generates none."""
    sample_tokens: int = 96
    """Tokens of the sample."""
    sample_temperature: float = 0.8
    """Temperature of the sample; 0 is greedy."""

    def __post_init__(self) -> None:
        """Raise ConfigError on values out of range and unknown tasks."""
        for name in ("batch_size", "every_validations", "task_limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"evaluation.{name}: {value}, but it must be at least 1")
        for name in ("sample_tokens", "sample_temperature"):
            if getattr(self, name) < 0:
                raise ConfigError(f"evaluation.{name}: {getattr(self, name)}, but it must not be negative")
        for name in self.tasks:
            find_task(name)
