"""A rank that fails, wherever it is, ends all of them soon, with an exit code, and with its reason printed once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from callbacks.failures import is_lost_contact
from src.errors import TrainingError
from src.train import train
from src.training.checkpoints import CheckpointFiles
from src.training.lightning_module import LanguageModel
from tests.conftest import CONFIGS, small_config
from tests.distributed.patched_train import MESSAGE, main
from tests.distributed.processes import start_ranks, wait
from tests.gpu.devices import on_cpu, on_cuda

SCRIPT = Path(__file__).parent / "patched_train.py"
LIMIT_SECONDS = 60
TWO = ("trainer.devices=2", "data.micro_batch_size=2", "trainer.precision=32-true", "evaluation.dashboard=false")


class Run:
    """A training of two ranks that Lightning starts, as a user would start it."""

    def __init__(self, overrides: Sequence[str], directory: Path, fault: str = "") -> None:
        self.log, self.files = directory / "log", CheckpointFiles(directory / "quickstart" / "checkpoints")
        command = [sys.executable, str(SCRIPT), *overrides, *TWO, f"output_dir={directory}"]
        with self.log.open("w") as log:
            environment = {**os.environ, "FAULT": fault, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=CONFIGS.parent, start_new_session=True
            )

    def wait(self) -> int:
        """Wait for all ranks to be gone and return the exit code of the first."""
        code = self.process.wait(LIMIT_SECONDS)
        until = time.monotonic() + LIMIT_SECONDS
        while self.alive() and time.monotonic() < until:
            time.sleep(0.05)
        assert not self.alive()
        return code

    def alive(self) -> list[psutil.Process]:
        """Processes of the run's session: ranks and their loader workers."""
        return [process for process in psutil.process_iter() if _session(process) == self.process.pid]

    def ranks(self) -> list[psutil.Process]:
        """The two ranks, in order, once a checkpoint shows that they are training."""
        until = time.monotonic() + LIMIT_SECONDS
        while self.files.newest() is None:
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)
        return sorted(self.alive(), key=lambda process: int(process.environ().get("LOCAL_RANK", "0")))


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid) if process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None


def check_reason(text: str, rank: int) -> None:
    assert text.count(f"RuntimeError: {MESSAGE}") == 1, text
    assert text.count("Traceback") == 1, text
    assert f"rank {rank} failed" in text
    assert "lost contact" not in text, text


@pytest.mark.slow
def test_a_rank_that_raises_ends_what_lightning_started(tmp_path: Path, small_overrides: Sequence[str]) -> None:
    run = Run([*small_overrides, "trainer.strategy=ddp", "trainer.max_steps=5"], tmp_path, "step:1")
    assert run.wait() == 1
    check_reason(run.log.read_text(), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "strategy"),
    [("step:0", "fsdp2"), ("evaluation:0", "ddp"), ("evaluation:1", "fsdp2"), ("build:1", "ddp"), ("build:0", "fsdp2")],
)
def test_a_rank_that_raises_ends_the_others(
    fault: str, strategy: str, tmp_path: Path, small_overrides: Sequence[str]
) -> None:
    arguments = [*small_overrides, *TWO, f"trainer.strategy={strategy}", "trainer.max_steps=5"]
    ranks = start_ranks(partial(main, [*arguments, f"output_dir={tmp_path}"], fault), tmp_path / "logs")
    assert wait(ranks, LIMIT_SECONDS) == [1, 1]
    check_reason("".join((tmp_path / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1)), int(fault[-1]))
    assert not (tmp_path / "quickstart" / "lut" / "manifest.json").exists() or fault.startswith("evaluation")


@pytest.mark.parametrize(
    ("device", "killed"),
    [
        on_cpu("cpu", 0, slow=True),
        on_cpu("cpu", 1, slow=True),
        on_cuda("cuda", 0, devices=2),
        on_cuda("cuda", 1, devices=2),
    ],
)
def test_a_killed_rank_ends_the_run(device: str, killed: int, tmp_path: Path, small_overrides: Sequence[str]) -> None:
    endless = ("trainer.strategy=ddp", "trainer.max_steps=1000000", "checkpoint.every_steps=5")
    more = ("trainer.val_check_interval=1000000", f"trainer.accelerator={device}")
    run = Run([*small_overrides, *endless, *more], tmp_path)
    victim = run.ranks()[killed]
    victim.send_signal(signal.SIGKILL)
    assert run.wait() == (1 if killed else -signal.SIGKILL)
    text = run.log.read_text()
    assert text.count("was killed") == 1, text
    assert str(victim.pid) in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_a_signal_ends_ranks_of_which_one_waits_for_the_other(tmp_path: Path, small_overrides: Sequence[str]) -> None:
    options = ("trainer.strategy=ddp", "trainer.max_steps=5", "evaluation.at_fit_end=false")
    run = Run([*small_overrides, *options], tmp_path, "wait:1")
    first = run.ranks()[0]
    until = time.monotonic() + LIMIT_SECONDS
    while "waiting" not in run.log.read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(1)  # for the first rank to wait in a barrier
    first.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert run.wait() == 128 + signal.SIGTERM
    assert time.monotonic() - began < 10
    text = run.log.read_text()
    assert text.count("SIGTERM: stopped") == 1, text
    assert "failed" not in text
    assert "killed" not in text


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1"),
            True,
        ),
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1."), True),
        (RuntimeError("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)"), True),
        (RuntimeError("ncclRemoteError: A call failed possibly due to a remote process exiting prematurely."), True),
        (torch.distributed.DistNetworkError("The client socket has timed out"), True),
        (RuntimeError("the checkpoint was restored by a peer, but the connection to its store timed out"), False),
        (ValueError("gloo/transport"), False),
    ],
)
def test_only_errors_of_collectives_mean_lost_contact(error: Exception, lost: bool) -> None:
    assert is_lost_contact(error) == lost


def test_a_step_that_is_not_finite_names_the_rank_that_saw_it(
    tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = LanguageModel._losses

    def broken(self: LanguageModel, *arguments: object, **options: object) -> object:
        loss, objective = losses(self, *arguments, **options)  # type: ignore[arg-type]
        bad = self.trainer.global_step == 6 and self.trainer.global_rank == 1
        return loss * (float("nan") if bad else 1), objective

    monkeypatch.setattr(LanguageModel, "_losses", broken)
    more = ("trainer.strategy=ddp_fork", "trainer.max_steps=9", "data.num_workers=1")
    config = small_config(small_overrides, tmp_path, *TWO, *more)
    with pytest.raises(Exception, match=r"step 7: not finite;") as failed:
        train(config)
    text = str(failed.value)
    assert TrainingError.__name__ in text
    assert "rank 1: losses of its micro-batches nan, nan, sample numbers [50, 51, 54, 55]" in text
    assert "rank 0:" not in text.partition("TrainingError")[2]
