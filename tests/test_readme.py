"""The README's two commands are sacred: a test takes them from there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CONFIGS

ROOT = CONFIGS.parent
COMMANDS = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python3.11 -m venv")]


def steps_of(command: str) -> list[str]:
    return command.split(" && ")


def test_the_readme_has_one_line_to_run_and_one_to_test() -> None:
    assert [steps_of(command)[-1] for command in COMMANDS] == [".venv/bin/python -m src.train", ".venv/bin/pytest"]
    for command in COMMANDS:
        assert steps_of(command)[:-1] == [
            "python3.11 -m venv .venv",
            '.venv/bin/pip install "torch==2.13.*" -e ".[dev]"',
        ]


def test_every_verb_in_the_readme_exists() -> None:
    verbs = set(re.findall(r"python -m (src(?:\.[a-z_]+)+)(?![.<a-z_])", (ROOT / "README.md").read_text()))
    assert "src.verify" in verbs
    for verb in verbs:
        assert (ROOT / (verb.replace(".", "/") + ".py")).is_file(), verb


@pytest.mark.slow
def test_the_first_command_runs_with_few_steps(tmp_path: Path) -> None:
    _, *arguments = shlex.split(steps_of(COMMANDS[0])[-1])
    few = [f"output_dir={tmp_path}", "trainer.max_steps=3", "data.validation_windows=8", "wandb.mode=offline"]
    done = subprocess.run([sys.executable, *arguments, *few], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lookup form minus training form" in done.stderr
    assert (tmp_path / "quickstart" / "lut" / "manifest.json").is_file()
