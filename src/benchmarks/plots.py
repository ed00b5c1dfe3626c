"""Plots of timings."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from src.benchmarks.rounds import Timings


def bars(groups: Mapping[str, Timings], path: Path, label: str, scale: float) -> None:
    """Draw one panel per group, one bar per contender: medians on a logarithmic axis."""
    figure = Figure(figsize=(3.2 * len(groups), 4), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for panel, (title, timings) in zip(panels, groups.items(), strict=True):
        names = list(timings.seconds)
        panel.barh(names, [scale * timings.median(name) for name in names])
        panel.set_xscale("log")
        panel.set_title(title)
        panel.set_xlabel(label)
    figure.savefig(path, dpi=120)
