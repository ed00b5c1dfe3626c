"""The plots of a study's page: validation loss over steps, and held-out loss against memory or what is forgotten."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from src.studies.statistics import mean
from src.studies.summary import ArmRows, Summary
from src.system.files import atomic_path

CURVES, MEMORY, FORGETTING = "curves.png", "memory.png", "forgetting.png"
_MARKERS = {"dense": "s", "moe": "^", "mole": "o"}
_COLORS = {"dense": "#57606a", "moe": "#bf8700", "mole": "#0969da"}
_FULL_CURVES = 8
"""More arms than this are drawn in the order of the study, and the rest are left to the table."""


def draw_figures(summary: Summary, folder: Path) -> list[Path]:
    """Write the plots into `folder`, whole or not at all; return their paths."""
    paths: list[Path] = []
    scatter = _forgetting if main_figure(summary) == FORGETTING else _memory
    for name, figure in ((CURVES, _curves(summary)), (main_figure(summary), scatter(summary))):
        with atomic_path(folder / name) as temporary:
            # no version or date: the same rows give the same bytes
            figure.savefig(temporary, dpi=140, format="png", metadata={"Software": None})
        paths.append(folder / name)
    return paths


def main_figure(summary: Summary) -> str:
    """Return the file of the plot that answers the question: against memory, or against what is forgotten."""
    return FORGETTING if summary.has_general_losses else MEMORY


def kind(arm: ArmRows) -> str:
    """Return `dense`, `moe` or `mole`, as the arm's costs say: nothing, experts or rows are offloaded."""
    row = arm.rows[0]
    if not row.offloaded_parameters:
        return "dense"
    return "moe" if row.trained_parameters == row.resident_parameters + row.offloaded_parameters else "mole"


def mean_curve(arm: ArmRows) -> list[tuple[int, float]]:
    """Return steps and the mean validation loss of all seeds."""
    curves: Sequence[Mapping[int, float]] = [dict(row.curve_points) for row in arm.rows]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(step, mean([curve[step] for curve in curves])) for step in steps]


def _curves(summary: Summary) -> Figure:
    figure = Figure(figsize=(7.2, 4.4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for arm in _required(summary)[:_FULL_CURVES]:
        points = mean_curve(arm)
        if not points:  # it was not trained
            continue
        axes.plot(*zip(*points, strict=True), marker=_MARKERS[kind(arm)], markersize=4, label=arm.arm.label)
    _finish(axes, "optimizer steps", "validation loss (nats per token)")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _memory(summary: Summary) -> Figure:
    figure = Figure(figsize=(7.2, 4.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    arms = sorted((arm for arm in _required(summary) if math.isfinite(_loss(arm))), key=_in_memory)
    losses = [_loss(arm) for arm in arms]
    gap = 0.045 * (max(losses, default=0) - min(losses, default=0))
    heights: list[float] = []
    for _, column in itertools.groupby(arms, lambda arm: round(_in_memory(arm), -5)):
        heights += spread([_loss(arm) for arm in column], gap)
    for arm, height in zip(arms, heights, strict=True):
        place = 2 * _in_memory(arm) / 1e6
        bar = 0 if math.isnan(_error(arm)) else _error(arm)
        axes.errorbar(place, _loss(arm), yerr=bar, fmt=_MARKERS[kind(arm)], color=_COLORS[kind(arm)], capsize=2)
        axes.annotate(f"  {arm.arm.label}", (place, height), va="center", fontsize=7, color=_COLORS[kind(arm)])
    axes.margins(x=0.25)
    _finish(axes, "weights in memory at inference, 16 bit (MB)", "held-out loss (nats per token)")
    axes.set_title("MoE with its experts in memory; MoLE with its table on disk", fontsize=8, color="#57606a")
    return figure


def _forgetting(summary: Summary) -> Figure:
    figure = Figure(figsize=(7.2, 4.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    arms = [arm for arm in _required(summary) if math.isfinite(_loss(arm))]
    losses = [_loss(arm) for arm in arms]
    for arm, height in zip(arms, spread(losses, 0.045 * (max(losses) - min(losses))), strict=True):
        place, color = arm.mean(lambda row: row.general_loss), _COLORS[kind(arm)]
        bars = [0 if math.isnan(error) else error for error in (arm.stderr(lambda row: row.general_loss), _error(arm))]
        axes.errorbar(place, _loss(arm), xerr=bars[0], yerr=bars[1], fmt=_MARKERS[kind(arm)], color=color, capsize=2)
        axes.annotate(f"   {arm.arm.label}", (place + bars[0], height), va="center", fontsize=7, color=color)
    axes.margins(x=0.25)
    _finish(axes, "loss on general text (nats per token)", "held-out loss on the domain (nats per token)")
    axes.set_title("Lower is better learned; further to the left is less forgotten", fontsize=8, color="#57606a")
    return figure


def _required(summary: Summary) -> list[ArmRows]:
    """Return the arms that are not further ones, which would hide them."""
    return [arm for arm in summary.arms.values() if arm.arm.is_required]


def _loss(arm: ArmRows) -> float:
    return arm.mean(lambda row: row.held_out_loss)


def _error(arm: ArmRows) -> float:
    return arm.stderr(lambda row: row.held_out_loss)


def _in_memory(arm: ArmRows) -> int:
    row = arm.rows[0]
    return row.trained_parameters if kind(arm) == "moe" else row.resident_parameters


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Return heights of labels next to `values`, at least `gap` apart, in the same order of size."""
    order = sorted(range(len(values)), key=values.__getitem__)
    heights = list(values)
    for below, above in itertools.pairwise(order):
        heights[above] = max(heights[above], heights[below] + gap)
    shift = mean([height - value for height, value in zip(heights, values, strict=True)]) if values else 0.0
    return [height - shift for height in heights]


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
