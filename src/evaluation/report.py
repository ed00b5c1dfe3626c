"""The final report of a run, as JSON and as tables, with a sample of the model's text. Measures nothing itself."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from src.data.text_rule import TextRule
from src.data.tokenizer import num_ids
from src.evaluation.comparison import Comparison, compare, print_comparison
from src.evaluation.config import EvaluationConfig
from src.evaluation.perplexity import Score
from src.evaluation.results import Evaluation
from src.inference import generate
from src.model import Transformer
from src.system.console import text_table


@dataclass(frozen=True, kw_only=True)
class TableFacts:
    """Precision and size of the written table."""

    directory: str
    precision: str
    table_bytes: int
    bytes_per_token: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """The results of a run."""

    steps: int
    trained_tokens: int
    initial: Score | None
    """Held-out score before the first step."""
    training_evaluation: Evaluation
    """All scores of the training form; its first text is the held-out one."""
    lookup_evaluation: Evaluation | None
    """Scores of the lookup form, read from disk."""
    zlib_bits_per_byte: float
    """Bits per byte of `zlib -9` on the same held-out text."""
    table: TableFacts | None
    training_form_bytes: int
    """Weights in memory, experts included."""
    lookup_form_bytes: int | None
    """Weights in memory when the experts are a table on disk."""
    sample: str | None

    def evaluations(self) -> dict[str, Evaluation]:
        """Return the scores of each form that was scored."""
        both = {"training_form": self.training_evaluation, "lookup_form": self.lookup_evaluation}
        return {form: evaluation for form, evaluation in both.items() if evaluation is not None}

    @property
    def training_form(self) -> Score:
        """Held-out score of the training form."""
        return self.training_evaluation.texts[0].score

    @property
    def lookup_form(self) -> Score | None:
        """Held-out score of the lookup form."""
        return None if self.lookup_evaluation is None else self.lookup_evaluation.texts[0].score

    @property
    def difference(self) -> float | None:
        """Held-out loss of the lookup form minus that of the training form, in nats."""
        return None if self.lookup_form is None else self.lookup_form.loss - self.training_form.loss

    def comparison(self) -> list[Comparison]:
        return [] if self.lookup_evaluation is None else compare(self.training_evaluation, self.lookup_evaluation)

    def to_dict(self) -> dict[str, Any]:
        given = {"initial": self.initial, "training_form": self.training_form, "lookup_form": self.lookup_form}
        lookup = self.lookup_evaluation
        return {
            "steps": self.steps,
            "trained_tokens": self.trained_tokens,
            **{name: None if score is None else score.to_dict() for name, score in given.items()},
            "difference": self.difference,
            "zlib_bits_per_byte": self.zlib_bits_per_byte,
            "evaluation": {
                "training_form": self.training_evaluation.to_dict(),
                "lookup_form": None if lookup is None else lookup.to_dict(),
                "comparison": [row.to_dict() for row in self.comparison()],
            },
            "table": None if self.table is None else asdict(self.table),
            "training_form_bytes": self.training_form_bytes,
            "lookup_form_bytes": self.lookup_form_bytes,
            "sample": self.sample,
        }

    def metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for form, evaluation in self.evaluations().items():
            values = evaluation.texts[0].score.to_dict() | evaluation.metrics()
            metrics |= {f"final/{form}/{name}": value for name, value in values.items()}
        if self.difference is not None:
            metrics["final/difference"] = self.difference
        if self.table is not None:
            metrics |= {"lut/bytes": self.table.table_bytes, "lut/bytes_per_token": self.table.bytes_per_token}
        return metrics


def print_report(report: Report, console: Console, run: Path) -> None:
    """Print whether the model learned, whether both forms agree, what each costs, and which commands come next."""
    console.rule(f"[bold]{run}")
    console.print(f"trained {report.steps:,} steps on {report.trained_tokens:,} tokens\n")
    console.print(_scores_table(report))
    for form, evaluation in report.evaluations().items():
        if evaluation.diverged:
            texts = ", ".join(evaluation.diverged)
            console.print(f"{form.replace('_', ' ')} diverged: its loss on {texts} is too large or not a number")
    if report.difference is not None:
        console.print(f"lookup form minus training form: {report.difference:+.2e} nats per token\n")
        print_comparison(report.comparison(), "training form", "lookup form", console)
    console.print(_memory_table(report))
    if report.sample is not None:
        console.print("a sample from the trained model:", style="bold")
        console.print(report.sample, markup=False, highlight=False, style="dim")
    console.print("\nnext:", style="bold")
    commands = [f'python -m src.generate --run {run} --prompt "import os" --temperature 0.8 --seed 0']
    if report.lookup_form is not None:
        commands.append(f"python -m src.verify --run {run}")
    for command in commands:
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def _scores_table(report: Report) -> Table:
    table = text_table("held-out text", "", "nats/token", "perplexity", "bits per byte")
    rows = [
        ("before training", report.initial),
        ("training form (experts computed)", report.training_form),
        ("lookup form (rows read from disk)", report.lookup_form),
    ]
    for name, score in rows:
        if score is not None:
            table.add_row(name, f"{score.loss:.4f}", f"{score.perplexity:,.1f}", f"{score.bits_per_byte:.3f}")
    table.add_row("zlib -9, for comparison", "", "", f"{report.zlib_bits_per_byte:.3f}")
    return table


def _memory_table(report: Report) -> Table:
    table = text_table("what each form takes", "", "weights in memory", "on disk", "read per token")
    table.add_row("training form", _mebibytes(report.training_form_bytes), "", "")
    if report.table is not None and report.lookup_form_bytes is not None:
        table.add_row(
            f"lookup form ({report.table.precision})",
            _mebibytes(report.lookup_form_bytes),
            _mebibytes(report.table.table_bytes),
            f"{report.table.bytes_per_token / 1024:,.1f} KiB",
        )
    return table


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def sample_text(model: Transformer, rule: TextRule, config: EvaluationConfig) -> str | None:
    """Continue `config.sample_prompt`, with a fixed seed; None if the config asks for no sample."""
    if not config.sample_prompt or not config.sample_tokens:
        return None
    token_ids = rule.prompt(config.sample_prompt)
    prompt = torch.tensor([token_ids], device=model.embedding.weight.device)  # (1, T)
    new_tokens = min(config.sample_tokens, model.config.max_sequence_length - len(token_ids))
    continued = generate(
        model,
        prompt,
        max_new_tokens=new_tokens,
        temperature=config.sample_temperature,
        seed=0,
        num_ids=num_ids(rule.tokenizer),
    )
    return rule.plain.decode(continued[0].tolist())
