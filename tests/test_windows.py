"""Without what only POSIX systems have, runs can be read; training and building a table say in one line what can't."""

import json
import subprocess
import sys
from pathlib import Path

from src.train import RunResult
from tests.conftest import CONFIGS

SCRIPT = """
import importlib, os, signal, sys
import contextlib, matplotlib.pyplot, omegaconf, pyarrow.parquet, rich.console, safetensors.torch, tokenizers
import torch.distributed.checkpoint.state_dict
with contextlib.suppress(ImportError):  # an extra
    import lm_eval.api

class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name in LACKING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

LACKING = {"crypt", "fcntl", "grp", "nis", "pty", "pwd", "readline", "resource", "spwd", "syslog", "termios", "tty"}
for name in LACKING:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Lacking())
for module, names in {
    os: "O_DIRECT RWF_NOWAIT fork posix_fadvise pread preadv pwrite register_at_fork sched_getaffinity",
    signal: "SIGALRM SIGHUP SIGKILL SIGPIPE SIGUSR1 SIGUSR2 setitimer pthread_kill pthread_sigmask",
}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)

from src.cli import run_verb
for verb, *arguments in map(str.split, sys.argv[1:]):
    try:
        run_verb(lambda: importlib.import_module(f"src.{verb}").main(arguments))
        print(f"{verb}: 0", file=sys.stderr)
    except SystemExit as ended:
        print(f"{verb}: {ended.code}", file=sys.stderr)
"""
"""Takes a verb and its arguments from each argument; other people's packages know Windows, and are imported before."""


def run_verbs(*commands: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *commands], capture_output=True, text=True, cwd=CONFIGS.parent, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout, done.stderr


def test_reading_verbs_need_no_posix_module(trained: RunResult, tmp_path: Path) -> None:
    run, scores = trained.run_dir, tmp_path / "scores.json"
    texts, told = run_verbs(
        f"generate --run {run} --prompt import --max-new-tokens 4",
        f"generate --run {run} --prompt import --max-new-tokens 4 --reader memmap",
        f"generate --run {run} --prompt import --max-new-tokens 4 --reader memory",
        f"generate --run {run} --prompt import --max-new-tokens 4 --experts ffn",
        f"evaluate --run {run} --experts lut --json {scores}",
        f"convert --to official --input {run} --output {tmp_path}/official",
        f"convert --from official --input {tmp_path}/official --output {tmp_path}/back",
        f"verify --run {run}",
        f"inspect_lut --run {run} --token e",
    )
    assert [line for line in told.splitlines() if line.endswith(": 0")] == [
        *["generate: 0"] * 4,
        "evaluate: 0",
        *["convert: 0"] * 2,
        "verify: 0",
        "inspect_lut: 0",
    ]
    first = texts[: texts.index("\n", 1) + 1]
    assert texts.startswith(first * 2)
    assert json.loads(scores.read_text())
    assert (tmp_path / "back" / "experts.safetensors").is_file()


def test_training_and_building_say_what_systems_are_supported(trained: RunResult, tmp_path: Path) -> None:
    _, told = run_verbs(
        f"train output_dir={tmp_path}",
        f"train --resume {trained.run_dir}",
        f"reparameterize --run {trained.run_dir} --lut {tmp_path}/lut",
        f"train --dry-run output_dir={tmp_path}",
    )
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert [error.partition(" runs on Linux and macOS")[0] for error in errors] == [
        "error: training",
        "error: training",
        "error: building a table",
    ]
    assert told.count("train: 2") == 2
    assert "reparameterize: 2" in told
    assert "train: 0" in told
    assert list(tmp_path.iterdir()) == []
