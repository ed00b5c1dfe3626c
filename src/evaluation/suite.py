"""What models are scored on, prepared once, and the scoring of one model, which may be in training.

Knows no reports: the verb and the callback decide what becomes of the scores.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from src.evaluation.config import EvaluationConfig
from src.evaluation.held_out import HELD_OUT, EvaluationCorpus, HeldOut, corpus_windows
from src.evaluation.likelihood import TextModel
from src.evaluation.perplexity import Share, loss_by_frequency, summarize, window_losses
from src.evaluation.results import Evaluation, TaskScore, TextScore, fingerprint_documents
from src.evaluation.tasks import ScoreTask, find_task
from src.model import Transformer
from src.system.console import Progress, no_progress
from src.system.random_state import capture_random_state, restore_random_state


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Texts and tasks, all of them read and checked."""

    text: HeldOut
    corpora: dict[str, Tensor]
    """Windows (N, T+1) int64 by corpus."""
    tasks: list[ScoreTask]
    notes: list[str] = field(default_factory=list[str])
    """What is not scored, and why."""


def prepare_suite(text: HeldOut, config: EvaluationConfig) -> Suite:
    """Read everything that is to be scored, so that mistakes show before a model is trained.

    A run's held-out `text` is scored itself, and the generated tasks are made of it; `config` names the rest.

    Raises:
        ConfigError: a task is unknown, or lm-eval is needed and not installed.
        DataError: data of a task or corpus is missing or damaged.
    """
    local_data = None if config.local_data is None else Path(config.local_data)
    found = {name: find_task(name, config.num_fewshot) for name in config.tasks}
    tasks = {name: task.prepare(text, config.task_limit, local_data) for name, task in found.items()}
    return Suite(
        text=text,
        corpora={
            HELD_OUT: text.windows,
            **{f"{HELD_OUT}/{name}": windows for name, windows in text.by_source.items()},
            **{corpus.name: _corpus_windows(corpus, text) for corpus in config.corpora},
        },
        tasks=[score for score in tasks.values() if score is not None],
        notes=[f"the held-out text has no documents for task {name}" for name, score in tasks.items() if score is None],
    )


def _corpus_windows(corpus: EvaluationCorpus, text: HeldOut) -> Tensor:
    if corpus.name in text.corpora:  # the run keeps them
        return text.corpora[corpus.name]
    return corpus_windows(corpus, text.rule, text.windows.shape[1] - 1)


def evaluate_model(
    model: Transformer,
    suite: Suite,
    *,
    batch_size: int,
    share: Share = Share(),  # noqa: B008 - frozen
    progress: Progress = no_progress,
) -> Evaluation:
    """Score a model, in eval mode, on all of a suite; every rank of `share` must call it, and gets the same result."""
    text_model = TextModel(
        model,
        suite.text.rule,
        max_length=model.config.max_sequence_length,
        device=model.embedding.weight.device,
        batch_tokens=batch_size * (suite.text.windows.shape[1] - 1),
        share=share,
        progress=progress,
    )
    texts = [
        _score_text(name, model, corpus, suite.text, batch_size, share, progress)
        for name, corpus in suite.corpora.items()
    ]
    tasks: dict[str, TaskScore] = {}  # a task may be in several groups
    for score in suite.tasks:
        scored = score(text_model)
        tasks |= {each.task: each for each in (scored if isinstance(scored, list) else [scored])}
    return Evaluation(texts=texts, tasks=list(tasks.values()))


@torch.no_grad()
def _score_text(
    name: str, model: Transformer, windows: Tensor, text: HeldOut, batch_size: int, share: Share, progress: Progress
) -> TextScore:
    with progress(f"{name} (windows)", len(windows)) as advance:
        losses = window_losses(
            model, windows, batch_size=batch_size, share=share, progress=advance, mask=text.mask
        )  # (N, T)
    return TextScore(
        corpus=name,
        score=summarize(losses, windows, text.byte_lengths),
        window_losses=losses.double().mean(dim=1).tolist(),
        bands=loss_by_frequency(losses, windows[:, 1:], text.token_counts),
        fingerprint=fingerprint_documents(windows.tolist()),
    )


@contextmanager
def evaluating(model: Transformer) -> Generator[None]:
    """Evaluate in full precision, without gradients; leave every mode and every random generator as they were."""
    modes = {name: module.training for name, module in model.named_modules()}
    random_state = capture_random_state()
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.embedding.weight.device.type, enabled=False):
            yield
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
        restore_random_state(random_state)
