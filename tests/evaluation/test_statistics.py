"""Paired tests against values worked out by hand and taken from tables."""

import math

import pytest

from src.evaluation.results import mcnemar, paired_difference, standard_error, student_t_tail


def test_standard_error_is_that_of_the_mean() -> None:
    assert standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(5 / 3) / 2)
    assert math.isnan(standard_error([1.0]))


@pytest.mark.parametrize(("won", "lost", "expected"), [(1, 7, 18 / 256), (7, 1, 18 / 256), (0, 0, 1), (3, 3, 1)])
def test_mcnemar_counts_documents_that_only_one_got_right(won: int, lost: int, expected: float) -> None:
    assert mcnemar([1.0] * won + [-1.0] * lost + [0.0] * 50) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("statistic", "degrees", "expected"), [(12.706, 1, 0.05), (2.262, 9, 0.05), (3.25, 9, 0.01), (1.96, 10**6, 0.05)]
)
def test_student_as_in_tables(statistic: float, degrees: int, expected: float) -> None:
    assert student_t_tail(statistic, degrees) == pytest.approx(expected, rel=2e-3)


def test_pairing_finds_what_means_hide() -> None:
    base = [float(value) for value in range(100)]
    shifted = [value + 0.1 + 0.01 * (index % 2) for index, value in enumerate(base)]
    found = paired_difference(base, shifted)
    assert found.test == "t"
    assert found.difference == pytest.approx(0.105)
    assert found.stderr == pytest.approx(0.0005, rel=0.02)
    assert found.p_value < 1e-6
    same = paired_difference(base, base)
    assert (same.difference, same.stderr, same.p_value) == (0, 0, 1)
    right = paired_difference([1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0])
    assert (right.test, right.first, right.second, right.p_value) == ("McNemar", 0.75, 0.25, 0.5)


def test_other_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="2 against 1 documents"):
        paired_difference([1.0, 2.0], [1.0])
