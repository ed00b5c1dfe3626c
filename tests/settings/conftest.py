"""Verbs run in this process, in an empty directory that a refusal must leave empty."""

import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

import pytest

from src.cli import run_verb
from tests.settings.verdicts import Outcome, RunVerb


@pytest.fixture
def untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in an empty directory, which must stay empty, without processes and connections."""

    def forbidden(*_: object, **__: object) -> NoReturn:
        raise AssertionError("work before a refusal")

    monkeypatch.chdir(tmp_path)
    for owner, name in ((subprocess.Popen, "__init__"), (BaseProcess, "start"), (socket.socket, "connect")):
        monkeypatch.setattr(owner, name, forbidden)
    yield tmp_path
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run_in_process(capsys: pytest.CaptureFixture[str]) -> RunVerb:
    """Run a verb as a command would; what it does not catch fails the test."""

    def run(main: Callable[[Sequence[str]], None], *arguments: str) -> Outcome:
        code = 0
        capsys.readouterr()
        try:
            run_verb(lambda: main(arguments))
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err.splitlines())

    return run
