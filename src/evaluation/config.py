"""What is measured during and after training."""

from dataclasses import dataclass, field

from src.errors import ConfigError, check_range
from src.evaluation.held_out import HELD_OUT, EvaluationCorpus
from src.evaluation.tasks import find_task


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The evaluation callback."""

    at_fit_end: bool = True
    """Score both forms on the held-out windows when training is done."""
    every_validations: int | None = None
    """Also score the training form on tasks and texts every N validations; null scores it at the end only."""
    tasks: list[str] = field(default_factory=lambda: ["next_passage", "repeated_word"])
    """Names of tasks; `python -m src.evaluate --help` lists ours. Every task, tag and group of lm-eval is one, too, and
    needs the extra `eval`."""
    num_fewshot: int | None = None
    """Examples in front of each document of lm-eval's tasks; null takes as many as a task defines."""
    task_limit: int | None = None
    """Largest number of documents per task; null takes all, or 100 of a task made of held-out text."""
    local_data: str | None = None
    """Folder with the data of lm-eval's tasks as <task>.<split>.jsonl or .jsonl.gz; null fetches them from the Hugging
    Face hub."""
    corpora: list[EvaluationCorpus] = field(default_factory=list[EvaluationCorpus])
    """More texts to score than the held-out one; each has a `name` and `files`."""
    batch_size: int = 16
    """Windows per forward pass; tasks take as many tokens at a time."""
    dashboard: bool = True
    """At each validation, plot the routers into `figures/` and log the plots."""
    sample_prompt: str = "def "
    """Prompt of the final sample; an empty one generates no sample."""
    sample_tokens: int = 96
    """Tokens of the sample."""
    sample_temperature: float = 0.8
    """Temperature of the sample; 0 is greedy."""

    def __post_init__(self) -> None:
        check_range(self, "evaluation.", ("batch_size", "every_validations", "task_limit"), at_least=1)
        check_range(self, "evaluation.", ("num_fewshot", "sample_tokens", "sample_temperature"), at_least=0)
        for name in self.tasks:
            find_task(name)
        names = [corpus.name for corpus in self.corpora]
        for name in names:
            if names.count(name) > 1 or name.partition("/")[0] == HELD_OUT:
                taken = "is another corpus too" if names.count(name) > 1 else "is the run's own held-out text"
                raise ConfigError(f"evaluation.corpora: {name} {taken}; give this one a name of its own")
