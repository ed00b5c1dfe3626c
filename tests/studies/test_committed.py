"""The results that the project carries: their pages say what they say, and the README quotes nothing else."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from src.studies.definition import load_study
from src.studies.figures import main_figure
from src.studies.page import page_text
from src.studies.rows import read_rows
from src.studies.summary import Summary
from tests.conftest import CONFIGS
from tests.studies.made_up import rows, write_study

README = CONFIGS.parent / "README.md"
RESULTS = [path for path in sorted(CONFIGS.glob("studies/*/results.csv")) if path.parent.name != "example"]
BLOCK = re.compile(r"<!-- study -->(.*?)<!-- /study -->", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])(?<!\w-)\d[\d,]*(?:\.\d+)?(?![\w-]|\.\d)")


def numbers(text: str) -> list[str]:
    """Return the numbers of a text as digits; those in names, such as MoLE-4E, and in links are none."""
    without_links = re.sub(r"\]\([^)]*\)", "]", text)
    return [found.group().replace(",", "") for found in NUMBER.finditer(without_links)]


def values(summary: Summary) -> Iterator[float]:
    """Yield what results.csv holds and gives: cells, means and errors, shares in percent, paired differences."""
    for row in summary.rows:
        yield from (value for value in vars(row).values() if isinstance(value, int | float))
    arms = summary.arms
    for arm in arms.values():
        for name in ("held_out_loss", "general_loss", "bits_per_byte", "zeroed_loss", "permuted_loss"):
            yield from (statistic(lambda row, name=name: getattr(row, name)) for statistic in (arm.mean, arm.stderr))
        yield float(len(arm.rows))
    for name in arms if summary.study.share_of in arms else ():
        yield from (100 * value for value in summary.share(name))
    for first in arms:
        for second in arms:
            found = summary.compare(first, second).over_seeds
            if found is not None and first != second:
                yield from (found.mean, found.stderr, found.low, found.high, found.p_value)


def unfounded(text: str, summaries: Sequence[Summary]) -> list[str]:
    """Return the numbers of a text that no results give, rounded to as many decimals."""
    known = [abs(value) for summary in summaries for value in values(summary)]
    return [
        number
        for number in numbers(text)
        if not any(f"{value:.{len(number.partition('.')[2])}f}" == number for value in known)
    ]


def summary_of(results: Path) -> Summary:
    return Summary(load_study(results.with_name("study.yaml")), read_rows(results))


@pytest.mark.parametrize("results", RESULTS, ids=lambda path: path.parent.name)
def test_a_committed_page_is_written_from_its_results(results: Path) -> None:
    assert results.with_name("README.md").read_text(encoding="utf-8") == page_text(summary_of(results))
    assert all(results.with_name(figure).is_file() for figure in (main_figure(summary_of(results)), "curves.png"))


def test_every_number_of_the_readmes_study_is_in_results() -> None:
    for block in BLOCK.findall(README.read_text(encoding="utf-8")):
        assert numbers(block)
        assert unfounded(block, [summary_of(results) for results in RESULTS]) == []


def test_a_number_from_nowhere_is_found(tmp_path: Path) -> None:
    summary = Summary(write_study(tmp_path / "study"), rows([3.0, 3.1, 2.9], [2.8, 2.9, 2.71]))
    text = "MoLE-4E is 0.197 ± 0.003 nats below Dense (3.0000) [on 3 seeds](page-9.md), as in arXiv 2503.15798"
    assert numbers(text) == ["0.197", "0.003", "3.0000", "3", "2503.15798"]
    assert unfounded(text, [summary]) == ["2503.15798"]
    assert unfounded("0.198 nats", [summary]) == ["0.198"]
