"""The table and the page of a study: they need `results.csv` alone, and say what it says."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from src.errors import RunError
from src.studies.cells import best_value
from src.studies.figures import spread
from src.studies.rows import Row, read_rows, write_rows
from src.studies.summary import Summary
from src.study import main
from tests.studies.made_up import row, rows, write_study

DENSE, MOLE, MOE = [3.0, 3.1, 2.9], [2.8, 2.9, 2.71], [2.8, 2.9, 2.7]


def page(folder: Path, results: list[Row]) -> str:
    """Write results and definition into a new folder, and the page by the command."""
    study = write_study(folder)
    write_rows(study.results_path, results)
    main(["--study", str(study.path), "--report"])
    return study.page_path.read_text(encoding="utf-8")


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = [row("mole", 1, 2.123456789012345), row("dense", 0, math.inf), row("dense", 7, 3.0, "2e-3")]
    write_rows(tmp_path / "results.csv", written)
    assert [str(item) for item in read_rows(tmp_path / "results.csv")] == [str(item) for item in written]
    assert read_rows(tmp_path / "none.csv") == []
    first = (tmp_path / "results.csv").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("arm,seed,value,held_out_loss,bits_per_byte,")


def test_a_damaged_table_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    write_rows(path, rows(DENSE, MOLE))
    text = path.read_text(encoding="utf-8")
    for changed, message in (
        (text.replace("2.71,", "much,"), r"results.csv: line 7: could not convert .*; restore the file"),
        (text.replace("held_out_loss", "loss", 1), r"results.csv: has no column held_out_loss"),
        (text[: text.rindex(",1234567")], r"results.csv: line 9: has fewer fields than there are columns; restore"),
    ):
        path.write_text(changed, encoding="utf-8")
        with pytest.raises(RunError, match=message):
            read_rows(path)


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    text = page(tmp_path / "study", rows(DENSE, MOLE, MOE))
    better = "| MoLE against Dense. It reads more. | better | better | **holds** | -0.1967 ± 0.0033 |"
    assert better in text
    assert "| too small to matter | **holds** |" not in text  # one seed differs, which leaves a wide interval
    assert "no difference at this resolution | **undecided** | -0.0033 ± 0.0033 |" in text
    assert "| MoLE | 0, 1, 2 | 2.8033 ± 0.0549 | 1.4017 ± 0.0274 | 2.8033 |" in text
    assert "| MoLE | 2.8033 | 3.3033 (+0.5000) | 3.5533 (+0.7500) |" in text
    assert "| one, Dense | 3.5000 | 3.2500 | 2e-3 (at the edge of what was tried) |" in text
    assert "never" not in text  # no token of that band was held out
    assert "10 to 99 times" in text
    assert "No result yet" not in text
    assert "- commit 1234567\n" in text


def test_facts_against_a_hypothesis_stand_as_plainly(tmp_path: Path) -> None:
    text = page(tmp_path / "study", rows(DENSE, [loss + 0.2 for loss in DENSE], MOE))
    assert "| better | worse | **does not hold** | +0.2000 ± 0.0000 |" in text
    assert "| no difference | better | **does not hold** |" in text


def test_what_is_missing_diverged_or_of_another_commit_is_named(tmp_path: Path) -> None:
    results = [item for item in rows(DENSE, MOLE, MOE) if item.key not in {("mole", 1, ""), ("moe", 2, "")}]
    results[1] = replace(results[1], commit="7654321")
    results = [replace(item, held_out_loss=math.inf) if item.key == ("moe", 0, "") else item for item in results]
    text = page(tmp_path / "study", results)
    assert "No result yet: mole-s1, moe-s2." in text
    assert "| MoE | 0, 1 | diverged |" in text
    assert "- commit 7654321: dense-s1" in text
    assert "MoE against MoLE. They have as many parameters. | no difference | diverged | **undecided** |" in text


def test_one_seed_is_tested_by_window(tmp_path: Path) -> None:
    text = page(tmp_path / "study", rows(DENSE[:1], MOLE[:1]))
    assert "better (paired t test over 3 windows of one seed) | **holds** | -0.2000 |" in text


def test_no_results_give_a_page_that_says_so(tmp_path: Path) -> None:
    assert "No cell has a result yet." in page(tmp_path / "study", [])


def test_cells_on_other_text_are_not_compared(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study")
    results = [replace(item, corpus="other") if item.key == ("mole", 1, "") else item for item in rows(DENSE, MOLE)]
    assert Summary(study, results).compare("mole", "dense").seeds == (0, 2)


def test_arms_are_compared_at_equal_tokens(tmp_path: Path) -> None:
    longer = [replace(item, tokens=2 * item.tokens) for item in rows([], MOLE, MOE)]
    summary = Summary(write_study(tmp_path / "study"), [*rows(DENSE, []), *longer])
    assert summary.comparisons() == [("moe", "mole")]
    text = page(tmp_path / "page", list(summary.rows))
    assert "| MoE against MoLE | no difference at this resolution |" in text
    assert "At 16,384 tokens (3 seeds), from best to worst: MoE 2.8000; MoLE 2.8033." in text
    assert Summary(summary.study, rows(DENSE, MOLE, MOE)).comparisons() == [("mole", "dense"), ("moe", "dense")]


def test_plots_are_whole_and_the_same_from_the_same_rows(tmp_path: Path) -> None:
    for name in ("first", "again"):
        page(tmp_path / name, rows(DENSE, MOLE, MOE))
    for figure in ("curves.png", "memory.png"):
        first, again = (tmp_path / name / figure for name in ("first", "again"))
        assert first.read_bytes() == again.read_bytes()
        with Image.open(first) as image:
            assert min(image.size) > 500


def test_labels_keep_apart_and_in_order() -> None:
    heights = spread([2.0, 1.0, 1.0, 5.0], 0.5)
    assert heights[1] < heights[2] < heights[0] < heights[3]
    assert heights[2] - heights[1] == pytest.approx(0.5)
    assert spread([], 1.0) == []


def test_the_best_value_is_known_when_all_have_a_result(tmp_path: Path) -> None:
    search = write_study(tmp_path / "study").search
    assert search is not None
    results = rows(DENSE, MOLE)
    assert best_value(search, "one", results) == "2e-3"
    assert best_value(search, "one", results[:-1]) is None
    assert best_value(search, "one", [*results[:-1], row("dense", 7, math.inf, "2e-3")]) == "1e-3"


def test_a_dry_run_lists_what_is_left_and_its_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path / "study")
    write_rows(study.results_path, rows(DENSE, MOLE[:1]))
    small = ["model.hidden_size=32", "model.num_layers=1", "data.global_batch_size=2", "data.micro_batch_size=2"]
    main(["--study", str(study.path), "--dry-run", "--arms", "dense,mole", "--jobs", "2", *small])
    shown = capsys.readouterr().out
    assert shown.count("has a result") == 6
    assert "2 to run, 2 at a time" in shown
    assert "1,024" in shown  # tokens of a cell
