"""Stop signals: at any moment they end a run soon, and resuming it gives what an undisturbed run gives."""

import ctypes
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from src.cli import run_verb
from src.run_directory import RunDirectory
from src.system.signals import Preempted, StopSignals, leave_on_stop_signals
from src.train import main, train
from src.training.checkpoints import CheckpointFiles
from src.training.lightning_module import LanguageModel
from tests.conftest import small_config
from tests.distributed.processes import start
from tests.training.test_lightning_module import ONLY_TRAIN
from tests.training.test_resume import ACCUMULATING, logged, resume
from tests.training.test_tracking import records

CHUNKS = 8
WITH_RESULTS = (
    *ONLY_TRAIN,
    "trainer.max_steps=6",
    "data.validation_windows=8",
    "lut.at_fit_end=true",
    "lut.dtype=float32",
    f"lut.chunk_tokens={512 // CHUNKS}",
    "evaluation.at_fit_end=true",
)
EVALUATE = "callbacks.evaluation.evaluate_model"


class Signalled:
    """Sends this process a signal in the middle of the accumulation of step `step`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, signum: int) -> None:
        losses, calls = LanguageModel._losses, 0

        def signalling(module: LanguageModel, *arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == 4 * step - 2:
                signal.raise_signal(signum)
            return losses(module, *arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(LanguageModel, "_losses", signalling)


@pytest.mark.parametrize(
    ("signum", "step", "workers", "more"),
    [
        (signal.SIGTERM, 5, 0, ()),
        (signal.SIGUSR1, 8, 2, ()),  # a validation follows step 8, and comes before the checkpoint
        (signal.SIGINT, 6, 0, ("checkpoint.ema_decay=0.9",)),
    ],
)
def test_a_stop_signal_loses_no_step(
    signum: int,
    step: int,
    workers: int,
    more: tuple[str, ...],
    tmp_path: Path,
    small_overrides: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = (*ACCUMULATING, *more, "trainer.max_steps=12")
    whole = train(small_config(small_overrides, tmp_path, *common, "name=whole")).run_dir
    with monkeypatch.context() as patch:
        Signalled(patch, step, signum)
        with pytest.raises(Preempted) as stopped:
            train(small_config(small_overrides, tmp_path, *common, "name=part", f"data.num_workers={workers}"))
    assert (stopped.value.step, stopped.value.exit_code) == (step, 128 + signum)
    part = tmp_path / "part"
    assert CheckpointFiles(part / "checkpoints").steps()[-1] == step
    assert max(logged(part)["train/loss"]) == step - 1  # counted from 0
    resume(part, f"data.num_workers={2 - workers}")
    assert logged(part) == logged(whole)
    assert RunDirectory(part).path.joinpath("checkpoints", "last.ckpt").resolve().name == "step-00000012.ckpt"


def results(run: Path) -> tuple[dict[str, bytes], dict[str, object]]:
    """Return what a finished run offers its readers: the files of its table, and its report."""
    table = {path.name: path.read_bytes() for path in sorted((run / "lut").iterdir())}
    return table, RunDirectory(run).record()


def signal_at(patch: pytest.MonkeyPatch, target: str, call: int, signum: int = signal.SIGTERM) -> None:
    """Send this process a signal in the `call`-th call of the function or method `target`."""
    original, calls = pkgutil.resolve_name(target), 0

    def signalling(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(signum)
        return original(*arguments, **named)

    patch.setattr(target, signalling)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small_overrides: Sequence[str]) -> Path:
    """A run of 6 steps with table and report; treat its directory as read-only."""
    return train(small_config(small_overrides, tmp_path_factory.mktemp("finished"), *WITH_RESULTS)).run_dir


@pytest.mark.parametrize(
    ("target", "call", "left", "signum"),
    [
        ("src.run_directory.RunDirectory.write_weights", 1, "weights, table, evaluation", signal.SIGTERM),
        ("src.lut.builder.encode_chunk", 3, "table, evaluation", signal.SIGINT),
        ("callbacks.evaluation.evaluate_model", 2, "evaluation", signal.SIGINT),
        ("callbacks.evaluation.publish_results", 1, "", signal.SIGTERM),
    ],
)
def test_a_signal_after_the_last_step_ends_the_run_and_resuming_does_the_rest(
    target: str,
    call: int,
    left: str,
    signum: int,
    finished: Path,
    tmp_path: Path,
    small_overrides: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signum)
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        signal_at(patch, target, call, signum)
        train(small_config(small_overrides, tmp_path, *WITH_RESULTS))
    run = tmp_path / finished.name
    assert signal.getsignal(signum) == before
    assert (run / "lut" / "manifest.json").exists() == ("table" not in left)
    assert not list(run.rglob("*.tmp"))
    capsys.readouterr()
    begun, scored = Counted(monkeypatch, "src.lut.builder.encode_chunk"), Counted(monkeypatch, EVALUATE)
    written = Counted(monkeypatch, "src.run_directory.RunDirectory.write_weights")
    report = resume(run).report
    told = " ".join(capsys.readouterr().err.split())
    assert (f"the run is missing {left};" if left else "the run is complete;") in told
    assert (report is not None) == ("evaluation" in left)
    assert written.calls == ("weights" in left)
    assert 0 < begun.calls < CHUNKS if left == "table, evaluation" else begun.calls == CHUNKS * ("table" in left)
    assert scored.calls == 2 * ("evaluation" in left)
    assert results(run) == results(finished)
    assert resume(run).report is None
    assert "the run is complete" in " ".join(capsys.readouterr().err.split())


class Counted:
    """Counts the calls of the function or method `target`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
        original, self.calls = pkgutil.resolve_name(target), 0

        def counting(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            return original(*arguments, **named)

        monkeypatch.setattr(target, counting)


def test_a_preempted_run_did_not_fail_at_wandb(
    tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(small_overrides, tmp_path, *ACCUMULATING, "trainer.max_steps=4", "wandb.mode=offline")
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        signal_at(patch, "src.training.lightning_module.LanguageModel.training_step", 2)
        train(config)
    (finished,) = (record["exit"] for record in records(tmp_path / "quickstart") if "exit" in record)
    assert finished.get("exit_code", 0) == 0


def test_a_table_of_other_weights_is_not_taken_for_the_runs_own(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    before = results(run)
    report = resume(run, "trainer.max_steps=9", "lut.at_fit_end=false").report
    assert report is not None
    assert report.lookup_form is report.table is None
    assert RunDirectory(run).record()["table"] is None
    report = resume(run, "lut.at_fit_end=true").report
    assert report is not None
    assert report.difference == pytest.approx(0, abs=1e-6)
    assert results(run)[0]["manifest.json"] != before[0]["manifest.json"]


def test_a_signal_in_a_long_validation_waits_for_nothing(
    tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("callbacks.checkpoints.LONG_SECONDS", 0)
    common = (*ACCUMULATING, "trainer.max_steps=12", "trainer.val_check_interval=4", "checkpoint.ema_decay=0.9")
    whole = train(small_config(small_overrides, tmp_path, *common, "name=whole")).run_dir
    for name, moment in (("middle", 5), ("last", 9)):  # a validation has 4 batches
        with monkeypatch.context() as patch, pytest.raises(Preempted):
            signal_at(patch, "src.training.lightning_module.LanguageModel.validation_step", moment)
            train(small_config(small_overrides, tmp_path, *common, f"name={name}"))
        assert CheckpointFiles(tmp_path / name / "checkpoints").newest() is not None
        resume(tmp_path / name)
        assert logged(tmp_path / name) == logged(whole)


def test_a_run_that_used_up_its_time_is_finished_when_it_is_resumed(
    tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = (*WITH_RESULTS, "trainer.max_steps=100000", "trainer.max_time=00:00:00:01")
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        signal_at(patch, "src.lut.builder.encode_chunk", 3)
        train(small_config(small_overrides, tmp_path, *limited))
    run = tmp_path / "quickstart"
    steps = CheckpointFiles(run / "checkpoints").steps()[-1]
    report = resume(run).report
    assert report is not None
    assert (report.steps, CheckpointFiles(run / "checkpoints").steps()[-1]) == (steps, steps)
    capsys.readouterr()
    assert resume(run).report is None
    assert f"all {steps} steps are done, and the run is complete" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("signum", "seconds"), [(signal.SIGUSR1, 0.2), (signal.SIGINT, 0.2), (signal.SIGINT, 60)])
def test_a_signal_ends_a_process_whose_main_thread_is_stuck_in_c_code(
    signum: int, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.system.signals.UNWIND_SECONDS", seconds)

    def stuck() -> None:
        leave_on_stop_signals()
        StopSignals().listen()
        lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
        lock(mutex)
        (tmp_path / "ready").touch()
        lock(mutex)

    process = start(stuck, tmp_path / "log")
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    assert process.pid is not None
    os.kill(process.pid, signum)
    process.join(1 if seconds > 1 else 20)
    if seconds > 1:
        os.kill(process.pid, signum)  # at once, the second time
        process.join(20)
    assert process.exitcode == 128 + signum


SLOW = {
    "step": ("src.training.lightning_module.LanguageModel.training_step", 0.02),
    "build": ("src.lut.builder.encode_chunk", 0.2),
    "evaluation": (EVALUATE, 1.0),
}


def verb(arguments: Sequence[str], marks: Path | None = None) -> None:
    """Run `src.train` as a process would; with `marks`, slowly, leaving a file there when a place is reached."""
    for name, (target, seconds) in SLOW.items() if marks is not None else ():
        assert marks is not None
        pytest.MonkeyPatch().setattr(target, slowed(pkgutil.resolve_name(target), seconds, marks / name))
    leave_on_stop_signals()
    run_verb(partial(main, arguments))


def slowed(original: Callable[..., Any], seconds: float, mark: Path) -> Callable[..., Any]:
    def slow(*arguments: Any, **named: Any) -> Any:
        mark.touch()
        result = original(*arguments, **named)
        time.sleep(seconds)
        return result

    return slow


@pytest.mark.release
@pytest.mark.slow
def test_at_random_moments_a_signal_ends_the_run_and_resuming_completes_it(
    tmp_path: Path, small_overrides: Sequence[str], attacks: int
) -> None:
    common = [*small_overrides, f"output_dir={tmp_path}", *WITH_RESULTS, "trainer.max_steps=40"]
    whole = start(partial(verb, [*common, "name=whole"]), tmp_path / "log")
    whole.join(90)
    assert whole.exitcode == 0, (tmp_path / "log").read_text()
    expected, moments = results(tmp_path / "whole"), random.Random(0)
    for number, place in enumerate(["step", "build", "evaluation"] * attacks):
        run, marks, log = tmp_path / str(number), tmp_path / f"marks-{number}", tmp_path / f"log-{number}"
        marks.mkdir()
        process = start(partial(verb, [*common, f"name={number}"], marks), log)
        wait_for(marks / place, process)
        time.sleep(moments.uniform(0, 2.5 if place == "step" else 1.5))
        signum = moments.choice([signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
        assert process.pid is not None
        os.kill(process.pid, signum)
        process.join(10)
        assert process.exitcode == 128 + signum, log.read_text()
        assert (run / "lut" / "manifest.json").exists() or not list(run.glob("lut/manifest*"))
        for complete in (False, True):
            process = start(partial(verb, ["--resume", str(run)]), log)
            process.join(60)
            assert process.exitcode == 0, log.read_text()
            assert ("the run is complete" in " ".join(log.read_text().split())) == complete
        assert results(run) == expected, log.read_text()


def wait_for(file: Path, process: BaseProcess) -> None:
    until = time.monotonic() + 60
    while not file.exists():
        assert process.is_alive() and time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.slow
def test_the_verb_ends_with_128_and_the_signal(tmp_path: Path, small_overrides: Sequence[str]) -> None:
    endless = ("trainer.max_steps=1000000", "checkpoint.every_steps=5", "trainer.val_check_interval=1000000")
    overrides = [*small_overrides, f"output_dir={tmp_path}", *endless, "data.micro_batch_size=2"]
    command = [sys.executable, "-m", "src.train", *overrides, "trainer.devices=2", "trainer.strategy=ddp"]
    files = CheckpointFiles(tmp_path / "quickstart" / "checkpoints")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while files.newest() is None:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert told.count("SIGTERM: stopped after step") == 1
    assert not (tmp_path / "quickstart" / "lut").exists()
