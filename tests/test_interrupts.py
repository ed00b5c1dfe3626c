"""Ctrl-C: every verb cleans up and ends with 130 and without a traceback; a second one ends it at once."""

import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from src import convert, evaluate, export, generate, prepare_data, reparameterize, train, verify
from src.cli import run_verb
from src.system.signals import leave_on_stop_signals
from src.train import RunResult
from tests.conftest import CONFIGS
from tests.distributed.processes import start
from tests.training.test_lightning_module import ONLY_TRAIN
from tests.training.test_preemption import wait_for

Main = Callable[[Sequence[str]], None]


def verb(main: Main, arguments: Sequence[str], place: str, mark: Path, seconds: float) -> None:
    """Run a verb as a process would, slowly at the function `place`, which leaves `mark` when it is reached."""
    original = pkgutil.resolve_name(place)

    def slow(*given: Any, **named: Any) -> Any:
        mark.touch()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(0.01)
        return original(*given, **named)

    pytest.MonkeyPatch().setattr(place, slow)
    leave_on_stop_signals()
    run_verb(partial(main, arguments))


VERBS: dict[str, tuple[Main, tuple[str, ...], str]] = {
    "prepare_data": (
        prepare_data.main,
        ("--config", str(CONFIGS / "quickstart.yaml"), "SMALL", "data.cache_dir=OUT"),
        "src.data.packed_corpus.train_bpe",
    ),
    "reparameterize": (
        reparameterize.main,
        ("--run", "RUN", "--lut", "OUT", "--dtype", "int8"),
        "src.lut.builder.encode_chunk",
    ),
    "evaluate": (evaluate.main, ("--run", "RUN", "--json", "OUT"), "src.evaluate.evaluate_model"),
    "verify": (verify.main, ("--run", "RUN", "--json", "OUT"), "src.evaluation.proof.check_greedy"),
    "convert": (
        convert.main,
        ("--to", "official", "--input", "RUN", "--output", "OUT"),
        "src.interop.official._write_weights",
    ),
    "export": (
        export.main,
        ("--run", "RUN", "--to", "hf", "--output", "OUT"),
        "src.interop.export.copy_table",
    ),
    "generate": (generate.main, ("--run", "RUN", "--prompt", "import"), "src.generate.pieces"),
    "interactive": (generate.main, ("--run", "RUN", "--interactive"), "src.generate.interact"),
}


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_that_is_interrupted_leaves_nothing_half_written(
    name: str, trained: RunResult, small_overrides: Sequence[str], tmp_path: Path
) -> None:
    main, template, place = VERBS[name]
    out, log, mark = tmp_path / "out", tmp_path / "log", tmp_path / "mark"
    words = [word.replace("RUN", str(trained.run_dir)).replace("OUT", str(out)) for word in template]
    arguments = [each for word in words for each in (small_overrides if word == "SMALL" else [word])]
    before = sorted(trained.run_dir.rglob("*"))
    process = start(partial(verb, main, arguments, place, mark, 30), log)
    wait_for(mark, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    text = log.read_text()
    assert process.exitcode == 130, text
    assert "Traceback" not in text
    assert text.endswith("interrupted\n")
    assert sorted(trained.run_dir.rglob("*")) == before
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(out.rglob("manifest.json"))
    assert name in ("prepare_data", "reparameterize") or not out.exists()  # the next call continues these


def test_a_second_interrupt_ends_a_step_that_takes_long(small_overrides: Sequence[str], tmp_path: Path) -> None:
    mark, log = tmp_path / "mark", tmp_path / "log"
    arguments = [*small_overrides, *ONLY_TRAIN, f"output_dir={tmp_path}"]
    place = "src.training.lightning_module.LanguageModel._backward"
    process = start(partial(verb, train.main, arguments, place, mark, 60), log)
    wait_for(mark, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(0.5)
    assert process.is_alive()  # finishes the step
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == 130
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("module", ["generate", "benchmarks.loss"])
def test_an_interrupt_during_the_imports_ends_quietly(module: str) -> None:
    command = [sys.executable, "-m", f"src.{module}", "--help"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=CONFIGS.parent) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while "libtorch" not in maps.read_text():
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "")
