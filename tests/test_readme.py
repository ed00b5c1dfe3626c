"""The READMEs and `--help`: every command and program runs, with small settings."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

from src.interop.llama import LLAMA
from src.train import RunResult
from tests.conftest import CONFIGS, STDLIB
from tests.interop.checkpoints import write_block_folder
from tests.model.models import DENSE

ROOT = CONFIGS.parent
PAGES = [ROOT / "README.md", *sorted(CONFIGS.rglob("README.md")), *sorted((ROOT / "src").rglob("README.md"))]
BENCHMARKS = ROOT / "src" / "benchmarks" / "README.md"
SACRED = [line for line in PAGES[0].read_text().splitlines() if line.startswith("python3.11 -m venv")]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted([*(ROOT / "src").glob("*.py"), *BENCHMARKS.parent.glob("*.py")])
    if "options = parser(" in path.read_text()
]

INSTALL, NETWORK, EIGHT, FOUR = "installs packages", "needs a network", "needs eight devices", "needs four machines"
GPU = "needs a GPU"
LONG, HOURS = "takes a minute even with the smallest model, which tests/benchmarks runs", "takes hours"
IMPORTED = "needs a folder and a run imported from it, which tests/benchmarks makes"
TRAINS = "needs a trained MoE, which tests/benchmarks makes"
DRY_RUN, LOCAL = ["--dry-run"], ["data.sources=[]"]
LISTED: dict[str, tuple[str, list[str] | None]] = {
    "python3.11 -m venv .venv": (INSTALL, None),
    "pip install torch==2.13.* -e .[dev]": (INSTALL, None),
    "pytest": ("runs this test", None),
    "torchrun --nproc-per-node 8 -m src.train --config configs/paper/410m-mole-4e.yaml trainer.devices=8": (
        EIGHT,
        DRY_RUN,
    ),
    "torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint first-machine:29500 -m src.train "
    "--config configs/paper/1b-mole-4e.yaml trainer.devices=8 trainer.num_nodes=4 trainer.strategy=fsdp2": (
        FOUR,
        DRY_RUN,
    ),
    "sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --signal=SIGUSR1@120 --wrap srun --kill-on-bad-exit=1 "
    ".venv/bin/python -m src.train --config configs/paper/1b-mole-4e.yaml trainer.devices=8 trainer.num_nodes=4": (
        "needs SLURM",
        DRY_RUN,
    ),
    "python -m src.train --config configs/data/tinystories.yaml": (NETWORK, DRY_RUN),
    "python -m src.prepare_data --config configs/data/wikitext-103.yaml": (NETWORK, LOCAL),
    "python -m src.study --study configs/studies/family-code/study.yaml --jobs 2": (HOURS, DRY_RUN),
    "python -m src.study --study configs/studies/family-prose/study.yaml --jobs 2 corpus=texts": (HOURS, DRY_RUN),
    "python -m src.study --study configs/studies/plugin/study.yaml --jobs 2 corpus=texts": (HOURS, None),
    "python -m src.study --study configs/studies/plugin-smollm2/study.yaml corpus=texts base=runs/smollm2": (
        HOURS,
        None,
    ),
    "python -m src.benchmarks.gpu --output results/gpu.json": (GPU, None),
    "python -m src.benchmarks.gpu --minutes 5 --output gpu.json": (GPU, None),
    "python -m src.benchmarks.lookup --output results/lookup.json": (LONG, None),
    "python -m src.benchmarks.lookup --shape 160m-4e --rounds 15 --output results/lookup.json": (LONG, None),
    "python -m src.benchmarks.decode --output results/decode.json": (LONG, None),
    "python -m src.benchmarks.decode --shape 160m-4e --batches 1 8 32 --output results/decode.json": (LONG, None),
    "python -m src.benchmarks.figure": (LONG, None),
    "python -m src.benchmarks.figure --shape 160m-4e": (LONG, None),
    "python -m src.benchmarks.imported --folder SmolLM2-135M --run runs/smollm2": (IMPORTED, None),
    "python -m src.benchmarks.plugin --base runs/smollm2 --attach runs/plugin": (IMPORTED, None),
    "python -m src.benchmarks.lora --rank 16 -- --config configs/continue.yaml init_from=runs/quickstart": (
        "takes minutes; tests/studies trains with it",
        None,
    ),
    "python -m src.train --config configs/routing.yaml": ("takes minutes", DRY_RUN),
    "python -m src.benchmarks.routing --run runs/routing": (TRAINS, None),
    "python -m src.benchmarks.routing --run RUN --tokens 2000 --output routing.npz": (TRAINS, None),
}
"""Commands that small settings alone do not let run here: the reason, and what is appended; None only parses them."""

TEXT = [f"{STDLIB}/{package}/*.py" for package in ("json", "email", "http")]
SMALLER = {
    "src.generate": ["--max-new-tokens", "8"],
    "src.evaluate": ["--limit", "8"],
    "src.study": ["--seeds", "0", "trainer.max_steps=2", "trainer.val_check_interval=2", "model.vocab_size=512"],
    "src.benchmarks.loss": ["--tokens", "64", "--hidden-size", "8", "--vocab-size", "300", "--rounds", "2"],
    "src.benchmarks.train": ["--shape", "small", "--layers", "1", "--windows", "1", "--sequence-length", "32"],
    "src.benchmarks.build": ["--shape", "small-4e", "--layers", "1"],
    "src.benchmarks.data": ["--megabytes", "1", "--raw-megabytes", "1", "--vocab-size", "512", "--files", *TEXT],
}
"""What is appended to the other commands of a module, so that they take seconds."""
SMOLLM: dict[str, Any] = {
    "activation": "swiglu",
    "num_kv_heads": 1,
    "tie_embeddings": True,
    "vocab_size": 512,
    "max_sequence_length": 256,
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(shell: str) -> Iterator[list[str]]:
    """Yield the words of every command in lines for a shell."""
    for line in shell.replace("\\\n", " ").splitlines():
        for command in line.split(" && "):
            if words := shlex.split(command, comments=True):
                yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def printed(words: list[str]) -> str:
    return " ".join(" ".join(words).split())


def parts(words: list[str]) -> tuple[str, list[str]]:
    """Return the module and the arguments of a command, launchers such as torchrun and sbatch left out."""
    words = shlex.split(words[-1]) if words[0] == "sbatch" else words
    assert "-m" in words, f"`{printed(words)}` is no module of this project; list it in LISTED with the reason"
    _, module, *arguments = words[words.index("-m") :]
    return module, arguments


def main_of(module: str) -> Callable[[Sequence[str]], None]:
    return importlib.import_module(module).main


def help_of(module: str, arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main_of(module)([*arguments, "--help"])  # parses what comes before, then stops
    assert exit_.value.code == 0
    return capsys.readouterr().out


def examples(module: str, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    lines = re.findall(r"^  (python -m .+)$", help_of(module, [], capsys), re.MULTILINE)
    return list(commands("\n".join(lines)))


ON_PAGES = {page: list(commands("".join(blocks(page, "bash")))) for page in PAGES}
EVERY = [words for page in PAGES for words in ON_PAGES[page]]
IN_TEXT = [command for page in PAGES for command in re.findall(r"`(python -m src\.[^`<]+)`", page.read_text())]


def test_the_readme_has_one_line_to_run_and_one_to_test() -> None:
    assert [command.split(" && ")[-1] for command in SACRED] == [".venv/bin/python -m src.train", ".venv/bin/pytest"]
    for command in SACRED:
        assert command.split(" && ")[:-1] == [
            "python3.11 -m venv .venv",
            '.venv/bin/pip install "torch==2.13.*" -e ".[dev]"',
        ]


def test_the_readme_stays_short_and_its_links_lead_somewhere() -> None:
    assert len(PAGES[0].read_text().splitlines()) <= 170
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_readme_names_the_systems_that_the_package_declares() -> None:
    limits = PAGES[0].read_text().partition("## Limits")[2].partition("\n## ")[0]
    for system in ("Linux", "Python 3.11", "macOS", "Windows"):
        assert system in limits
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [name.rpartition(" :: ")[2] for name in project["classifiers"]]
    assert (declared, project["requires-python"]) == (["Linux", "MacOS", "3.11"], ">=3.11")
    environment = (ROOT / "environment.yml").read_text()
    assert "- python=3.11\n" in environment
    assert '"torch==2.13.*"' in environment and '-e ".[dev]"' in environment


def test_the_readmes_name_every_verb_and_every_benchmark() -> None:
    assert set(MODULES) <= {parts(words)[0] for words in EVERY if " -m src." in printed(words)}


def test_every_option_of_a_command_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (*EVERY, *commands("\n".join(IN_TEXT))):
        if " -m src." in printed(words):
            module, arguments = parts(words)
            own = arguments[: arguments.index("--")] if "--" in arguments else arguments
            for program, options in ((module, own), ("src.train", arguments[len(own) + 1 :])):  # what `--` passes on
                known = set(re.findall(r"--[a-z][a-z-]*", help_of(program, options, capsys)))
                assert {word for word in options if word.startswith("--")} <= known, printed(words)


def test_every_help_has_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {module: examples(module, capsys) for module in MODULES}
    assert [module for module, lines in shown.items() if not lines] == []
    for module, arguments in (parts(words) for lines in shown.values() for words in lines):
        help_of(module, arguments, capsys)
    assert set(LISTED) <= {
        printed(words) for words in (*EVERY, *(words for lines in shown.values() for words in lines))
    }


def test_a_command_that_is_no_module_must_be_listed() -> None:
    with pytest.raises(AssertionError, match=r"`curl https://x\.org` is no module of this project; list it"):
        parts(next(commands("curl https://x.org  # text")))


Run = Callable[[list[str]], None]


@pytest.fixture
def run(small_overrides: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in a folder with the files that the READMEs speak of, with small settings appended."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(CONFIGS, "configs")  # a copy, since a study writes its results there
    Path("MoLE-160M-4E").symlink_to(ROOT / "tests" / "golden" / "mole")
    write_block_folder(Path("SmolLM2-135M"), replace(DENSE, **SMOLLM), LLAMA, torch.bfloat16)
    Path("corpus").mkdir()
    Path("texts").mkdir()
    records = [json.dumps({"text": path.read_text()}) for path in sorted((STDLIB / "email").glob("*.py"))]
    Path("corpus/email.jsonl.zst").write_bytes(zstandard.compress("\n".join(records).encode()))
    Path("texts/email.txt").write_text("\n".join(records))

    def smaller(module: str, arguments: list[str]) -> list[str]:
        """Return what a command takes on top; the quick start's micro-batch, larger than a device's share, stays."""
        if {"--dry-run", "--print-config"}.intersection(arguments):
            return ["--arms", "dense"] if module == "src.study" else []  # a step of each arm is timed
        stated = {"data.micro_batch_size", *(word.partition("=")[0] for word in arguments)}
        small = [item for item in small_overrides if item.partition("=")[0] not in stated]
        if "init_from" in stated:  # which gives the model
            small = [item for item in small if not item.startswith("model.")]
        if module == "src.train":  # a resumed run keeps its own settings
            return ["trainer.max_steps=35"] if "--resume" in arguments else [*small, "trainer.max_steps=30"]
        text = [item for item in small if item.startswith(("data.files", "data.cache_dir", "data.validation"))]
        more = {"src.prepare_data": small, "src.study": [*SMALLER["src.study"], *text]}
        return more.get(module, SMALLER.get(module, []))

    def run(words: list[str]) -> None:
        _, instead = LISTED.get(printed(words), ("", []))
        if instead is None:
            return
        module, arguments = parts(words)
        arguments = [*arguments, *instead]
        if "trainer.devices=2" in arguments:  # which Lightning starts again for the second rank
            subprocess.run([sys.executable, "-m", module, *arguments, *smaller(module, arguments)], check=True)
        else:
            main_of(module)([*arguments, *smaller(module, arguments)])

    return run


@pytest.mark.slow
def test_the_readmes_commands_run_in_their_order(run: Run) -> None:
    for words in ON_PAGES[PAGES[0]]:
        run(words)
    for program in blocks(PAGES[0], "python"):
        exec(compile(program, "README.md", "exec"), {})
    assert Path("runs/quickstart/lut-nf4/manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.release] if page == BENCHMARKS else []) for page in PAGES[1:]],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_commands_of_the_other_pages_run(page: Path, run: Run, trained: RunResult) -> None:
    shutil.copytree(trained.run_dir, "runs/quickstart")
    for words in ON_PAGES[page]:
        run(words)
    for program in blocks(page, "python"):
        exec(compile(program, str(page), "exec"), {})


@pytest.mark.release
@pytest.mark.slow
def test_the_examples_of_every_help_run(run: Run, trained: RunResult, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained.run_dir, "runs/quickstart")
    for words in [words for module in MODULES for words in examples(module, capsys)]:
        if words not in EVERY:
            run(words)


@pytest.mark.release
@pytest.mark.slow
def test_the_first_command_runs_with_few_steps(tmp_path: Path) -> None:
    _, *arguments = shlex.split(SACRED[0].split(" && ")[-1])
    few = [f"output_dir={tmp_path}", "trainer.max_steps=3", "data.validation_windows=8", "wandb.mode=offline"]
    done = subprocess.run([sys.executable, *arguments, *few], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lookup form minus training form" in done.stderr
    assert (tmp_path / "quickstart" / "lut" / "manifest.json").is_file()
