"""The READMEs: their commands and Python run as printed, with small settings, and their figure shows their numbers."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from src.benchmarks.figure import main as draw_figure
from src.benchmarks.figure import read_decode_table
from src.errors import UserError
from src.train import RunResult
from tests.conftest import CONFIGS

ROOT = CONFIGS.parent
PAGES = [ROOT / name for name in ("README.md", "configs/README.md", "src/README.md", "src/lut/README.md")]
BENCHMARKS = ROOT / "src" / "benchmarks" / "README.md"
SACRED = [line for line in PAGES[0].read_text().splitlines() if line.startswith("python3.11 -m venv")]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the module and arguments of every command on a page, launchers such as torchrun left out."""
    for line in "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        if line and not line.startswith("python3.11"):
            words = shlex.split(line, comments=True)
            if "-m" not in words:  # within the quotes of `sbatch --wrap`
                words = shlex.split(words[-1])
            _, module, *arguments = words[words.index("-m") :]
            yield module, arguments


EVERY = [command for page in (*PAGES, BENCHMARKS) for command in commands(page)]


def main_of(module: str) -> Callable[[Sequence[str]], None]:
    return importlib.import_module(module).main


def test_the_readme_has_one_line_to_run_and_one_to_test() -> None:
    assert [command.split(" && ")[-1] for command in SACRED] == [".venv/bin/python -m src.train", ".venv/bin/pytest"]
    for command in SACRED:
        assert command.split(" && ")[:-1] == [
            "python3.11 -m venv .venv",
            '.venv/bin/pip install "torch==2.13.*" -e ".[dev]"',
        ]


def test_the_readme_stays_short_and_its_links_lead_somewhere() -> None:
    assert len(PAGES[0].read_text().splitlines()) <= 170
    for page in (*PAGES, BENCHMARKS):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_readmes_name_every_verb() -> None:
    named = {module for module, _ in EVERY}
    verbs = {path.stem for path in (ROOT / "src").glob("*.py") if "run_verb(main)" in path.read_text()}
    assert {f"src.{verb}" for verb in verbs - {"cli"}} <= named


@pytest.mark.parametrize(("module", "arguments"), EVERY, ids=lambda value: " ".join(value) if value else "")
def test_every_option_of_a_command_exists(
    module: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main_of(module)([*arguments, "--help"])  # parses what comes before, then stops
    assert exit_.value.code == 0
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    assert {word for word in arguments if word.startswith("--")} <= known


@pytest.fixture(scope="module")
def workplace(
    trained: RunResult, small_overrides: Sequence[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, list[str]], None]]:
    """A folder with the runs and files that the READMEs speak of; calling it runs a command there."""
    place = tmp_path_factory.mktemp("workplace")
    for name in ("quickstart", "eight-experts"):
        shutil.copytree(trained.run_dir, place / "runs" / name)
    (place / "configs").symlink_to(CONFIGS)
    (place / "MoLE-160M-4E").symlink_to(ROOT / "tests" / "golden" / "mole")
    small = [*small_overrides, "data.sources=[]"]

    def run(module: str, arguments: list[str]) -> None:
        if module == "src.train" and not {"--dry-run", "--print-config"}.intersection(arguments):
            arguments = [*arguments, "--print-config"]
        if module == "src.study":
            arguments = [*arguments, "--dry-run"]
        if module == "src.prepare_data":
            arguments = [*arguments, *small]
        main_of(module)(arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        yield run


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_and_program_runs(page: Path, workplace: Callable[[str, list[str]], None]) -> None:
    for module, arguments in commands(page):
        workplace(module, arguments)
    for program in blocks(page, "python"):
        exec(compile(program, str(page), "exec"), {})


@pytest.mark.slow
def test_the_first_command_runs_with_few_steps(tmp_path: Path) -> None:
    _, *arguments = shlex.split(SACRED[0].split(" && ")[-1])
    few = [f"output_dir={tmp_path}", "trainer.max_steps=3", "data.validation_windows=8", "wandb.mode=offline"]
    done = subprocess.run([sys.executable, *arguments, *few], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lookup form minus training form" in done.stderr
    assert (tmp_path / "quickstart" / "lut" / "manifest.json").is_file()


def test_the_figure_shows_the_numbers_of_the_table(tmp_path: Path) -> None:
    columns = read_decode_table(BENCHMARKS)
    machine = next(iter(columns.values()))
    assert machine["batch"] == [1, 8, 32]
    assert all(len(values) == 3 for values in machine.values())
    with Image.open(BENCHMARKS.with_name("decode.png")) as committed:
        assert json.loads(committed.info["Description"]) == columns, "run `python -m src.benchmarks.figure`"
    draw_figure(["--output", str(tmp_path / "again.png")])
    with Image.open(tmp_path / "again.png") as drawn:
        assert drawn.size == committed.size


def test_a_page_without_the_table_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("| | batch |\n|---|---|\n| Dense | 1 ms |\n")
    with pytest.raises(UserError, match="no table"):
        read_decode_table(tmp_path / "page.md")
