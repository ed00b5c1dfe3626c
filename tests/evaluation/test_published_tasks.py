"""Rows of the published tasks on disk: every mistake gets one line that says what to do."""

import importlib.util
import json
from pathlib import Path

import pytest

from src.errors import ConfigError, DataError
from src.evaluation.published_tasks import PUBLISHED, read_rows, require_known
from tests.evaluation.published_rows import write_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "evals")
    return tmp_path / "evals"


def test_all_eight_are_read_compressed_or_not(folder: Path) -> None:
    assert len(PUBLISHED) == 8
    for name in PUBLISHED:
        rows = read_rows(folder, name)
        assert len(rows) == (3 if name == "race" else 50)
        assert set(rows[0]) >= set(PUBLISHED[name].columns)
    assert len(read_rows(folder, "piqa", limit=7)) == 7


def test_other_forms_of_the_same_rows_are_understood(folder: Path) -> None:
    assert [row["label"] for row in read_rows(folder, "boolq", limit=3)] == [1, 0, 1]
    problems = read_rows(folder, "race")[0]["problems"]
    assert isinstance(problems, str)
    assert "'answer': 'A'" in problems


def test_a_missing_folder_file_and_split_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder of evaluation data; .* race.test.jsonl"):
        read_rows(Path("nowhere"), "race")
    (folder / "race.test.jsonl").unlink()
    with pytest.raises(DataError, match=r"evals: no file for task race; add race.test.jsonl, or .jsonl.gz"):
        read_rows(folder, "race")
    (folder / "arc_easy.test.jsonl.gz").rename(folder / "arc_easy.validation.jsonl.gz")
    expected = r"holds arc_easy.validation.jsonl.gz, but task arc_easy is scored on its test split; add arc_easy.test"
    with pytest.raises(DataError, match=expected):
        read_rows(folder, "arc_easy")


def test_damaged_rows_are_named(folder: Path) -> None:
    path = folder / "piqa.validation.jsonl"
    whole = path.read_text().splitlines()
    path.write_text("\n".join([whole[0], json.dumps({"goal": "x", "sol1": "y"})]))
    with pytest.raises(DataError, match=r"piqa.validation.jsonl, line 2: no 'sol2'; task piqa needs goal, sol1, sol2"):
        read_rows(folder, "piqa")
    path.write_text(whole[0] + "\n{")
    with pytest.raises(DataError, match=r"piqa.validation.jsonl, line 2: not JSON"):
        read_rows(folder, "piqa")
    path.write_text("")
    with pytest.raises(DataError, match=r"piqa.validation.jsonl: no rows"):
        read_rows(folder, "piqa")


def test_a_task_that_needs_the_extra_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: str) -> None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", none)
    with pytest.raises(
        ConfigError, match=r"task piqa needs lm-eval, which is not installed; pip install -e '.\[eval\]'"
    ):
        require_known(["piqa"], ())
    require_known(["next_passage"], ["next_passage"])
