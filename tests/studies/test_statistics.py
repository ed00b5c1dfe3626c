"""The statistics of studies, on made-up rows with known answers."""

import math
from collections.abc import Sequence

import pytest

from src.studies.statistics import ArmComparison, Measured, compare_arms, judge, paired, t_quantile

SMALLEST = 0.02


def arm(losses: Sequence[float | None], noise: float = 0.01) -> dict[int, Measured]:
    """Results by seed; windows scatter around each loss, alike in every arm."""
    return {
        seed: Measured(loss=loss, windows=[loss + noise * wave for wave in (-2, -1, 1, 2)])
        for seed, loss in enumerate(losses)
        if loss is not None
    }


BASE = arm([3.0, 3.1, 2.9])


def against_base(losses: Sequence[float | None]) -> ArmComparison:
    return compare_arms(arm(losses), BASE, SMALLEST)


@pytest.mark.parametrize(
    ("tail", "degrees", "expected"),
    [
        (0.05, 1, math.tan(math.pi / 2 * 0.95)),  # Cauchy
        (0.05, 2, 0.95 * math.sqrt(2 / (1 - 0.95**2))),
        (0.5, 1, 1.0),
        (0.05, 4, 2.7764451051977987),
        (0.01, 30, 2.7499956535670305),
    ],
)
def test_quantiles_are_those_of_closed_forms_and_tables(tail: float, degrees: int, expected: float) -> None:
    assert t_quantile(tail, degrees) == pytest.approx(expected, rel=1e-6)


def test_a_paired_test_and_its_interval_follow_the_closed_forms() -> None:
    """With two pairs the test is Cauchy's, with three p = 1 - t / sqrt(2 + t^2)."""
    two = paired([1.0, 4.0], [0.0, 1.0])  # differences 1 and 3
    assert (two.mean, two.stderr) == pytest.approx((2.0, 1.0))
    assert two.p_value == pytest.approx(1 - 2 / math.pi * math.atan(2.0))
    assert two.high - two.mean == pytest.approx(math.tan(math.pi / 2 * 0.95), rel=1e-6)
    three = paired([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    t = 2 / (1 / math.sqrt(3))
    assert three.stderr == pytest.approx(1 / math.sqrt(3))
    assert three.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t))
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) / math.sqrt(3)
    assert (three.low, three.high) == pytest.approx((2 - half, 2 + half), rel=1e-6)


def test_equal_differences_have_no_error() -> None:
    same = paired([1.1, 2.1, 3.1], [1.0, 2.0, 3.0])
    assert same.mean == pytest.approx(0.1)
    shifted = paired([1.5, 2.5], [1.0, 2.0])
    assert (shifted.stderr, shifted.p_value, shifted.low, shifted.high) == (0.0, 0.0, 0.5, 0.5)


def test_an_identical_arm_gives_no_difference() -> None:
    found = against_base([3.0, 3.1, 2.9])
    assert found.over_seeds is not None
    assert (found.verdict, found.over_seeds.mean, found.over_seeds.p_value) == (
        "no difference at this resolution",
        0,
        1,
    )


def test_ties_on_some_seeds_are_part_of_the_test() -> None:
    found = against_base([3.0, 3.1, 2.8])
    assert found.over_seeds is not None
    assert found.over_seeds.p_value == pytest.approx(1 - 1 / math.sqrt(3))  # t = -1 with two degrees of freedom
    assert found.verdict == "no difference at this resolution"


@pytest.mark.parametrize(("sign", "verdict"), [(-1, "better"), (1, "worse")])
def test_three_standard_errors_on_each_seed_decide(sign: int, verdict: str) -> None:
    stderr = 0.03  # of the windows' differences, and a tenth of it between seeds
    found = against_base([loss + sign * 3 * stderr + 0.003 * seed for seed, loss in enumerate((3.0, 3.1, 2.9))])
    assert found.verdict == verdict
    assert found.test == "paired t test over 3 seeds"


def test_a_small_and_certain_effect_is_too_small_to_matter() -> None:
    assert against_base([2.995, 3.0951, 2.8949]).verdict == "too small to matter"
    assert against_base([2.995, 3.0951, 2.8949]).over_seeds != against_base([2.9, 3.0, 2.8]).over_seeds
    assert against_base([2.999, 3.102, 2.899]).verdict == "too small to matter"  # zero is inside, and so is all else


def test_an_uncertain_effect_is_no_difference_at_this_resolution() -> None:
    assert against_base([2.9, 3.2, 2.7]).verdict == "no difference at this resolution"


def test_one_seed_has_no_test_over_seeds() -> None:
    first, second = arm([2.9]), arm([3.0])
    first[0] = Measured(loss=2.9, windows=[2.87, 2.89, 2.92, 2.92])
    found = compare_arms(first, second, SMALLEST)
    assert found.over_seeds is not None
    assert math.isnan(found.over_seeds.p_value)
    assert found.by_window[0].pairs == 4
    assert (found.verdict, found.test) == ("better", "paired t test over 4 windows of one seed")
    unpaired = compare_arms({0: Measured(loss=2.9, windows=[])}, second, SMALLEST)
    assert unpaired.verdict == "no difference at this resolution"


def test_a_missing_cell_leaves_its_seed_out() -> None:
    found = against_base([2.9, None, 2.8])
    assert (found.seeds, found.missing) == ((0, 2), (1,))
    assert found.over_seeds is not None
    assert found.over_seeds.pairs == 2
    nothing = compare_arms({5: BASE[0]}, BASE, SMALLEST)
    assert (nothing.verdict, nothing.over_seeds, nothing.missing) == ("no result", None, (0, 1, 2, 5))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_diverged_run_decides_nothing_else(loss: float) -> None:
    found = against_base([2.9, loss, 2.8])
    assert found.verdict == "diverged"
    assert math.isnan(found.by_window[1].mean)
    assert not math.isnan(found.by_window[0].mean)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 values against 1"):
        paired([1.0, 2.0], [1.0])


def test_the_smallest_difference_is_compared_with_the_whole_interval() -> None:
    sure = paired([0.015, 0.0151, 0.0149], [0.0, 0.0, 0.0])
    assert judge(sure, 0.02) == "too small to matter"
    assert judge(sure, 0.01) == "worse"
