"""Ctrl-C in a terminal reaches every process of a run: they save the last step together, and end without a word."""

import os
import signal
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed.test_failures import Run
from tests.training.test_lightning_module import ONLY_TRAIN
from tests.training.test_resume import logged, resume

ENDLESS = ("trainer.max_steps=1000000", "checkpoint.every_steps=5", "trainer.val_check_interval=1000000")


@contextmanager
def running(run: Run) -> Generator[Run]:
    """Wait until it trains; leave nothing behind."""
    try:
        run.ranks()
        yield run
    finally:
        for process in run.alive():
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_fork"])
def test_an_interrupt_of_all_processes_loses_no_step(
    strategy: str, small_overrides: Sequence[str], tmp_path: Path
) -> None:
    more = (f"trainer.strategy={strategy}", "data.num_workers=1")
    with running(Run([*small_overrides, *ONLY_TRAIN, *ENDLESS, *more], tmp_path)) as run:
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.wait() == 130
    check(run, signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(("member", "signum"), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_signal_to_one_of_forked_ranks_stops_all(
    member: int, signum: int, small_overrides: Sequence[str], tmp_path: Path
) -> None:
    with running(Run([*small_overrides, *ONLY_TRAIN, *ENDLESS, "trainer.strategy=ddp_fork"], tmp_path)) as run:
        parent, *ranks = sorted(run.alive(), key=lambda process: process.create_time())
        assert len(ranks) == 2
        [parent, *ranks][member].send_signal(signum)
        assert run.wait() == 128 + signum
    check(run, signum)


def check(run: Run, signum: int) -> None:
    """The run says once that it was stopped, and resumes from the step that it was in."""
    text = run.log.read_text()
    assert text.count(f"{signal.Signals(signum).name}: stopped") == 1, text
    for word in ("Traceback", "failed", "killed", "Terminating"):
        assert word not in text, text
    directory = run.files.directory.parent
    step = run.files.steps()[-1]
    before = logged(directory)["train/loss"]
    assert max(before) == step - 1
    resume(directory, f"trainer.max_steps={step + 2}", "trainer.devices=1", "trainer.strategy=auto")
    after = logged(directory)["train/loss"]
    assert max(after) == step + 1
    assert {number: after[number] for number in before} == before
