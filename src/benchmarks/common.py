"""What benchmarks share: shapes of models, rounds of contenders, what a figure was measured on, and how it is written.

Rounds are interleaved, so that drifts of the machine affect every contender alike, and figures are compared pairwise.
"""

import argparse
import json
import math
import platform
import random
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from matplotlib.figure import Figure
from rich.console import Console

from src.cli import input_file, number, output_directory, output_file
from src.config import load_config
from src.lut.codecs import CODECS
from src.model import ModelConfig
from src.system.console import Advance
from src.system.files import atomic_path, expand_home, write_text
from src.system.hardware import processor_name, usable_cores

Value = TypeVar("Value")
_PAPER = Path(__file__).parents[2] / "configs" / "paper"
SIZES = ("small", "160m", "410m", "1b")
"""The paper's models (arXiv:2503.15798, Table 2), as `configs/paper` has them, and one to try a benchmark with."""
SHAPES = tuple(f"{size}-{experts}e" for size in SIZES for experts in (4, 16))


def dense_config(size: str) -> ModelConfig:
    """Return the Dense model of a size in `SIZES`."""
    if size == "small":
        return ModelConfig(vocab_size=50304, hidden_size=256, num_layers=2, num_heads=4, intermediate_size=1024)
    return load_config(_PAPER / f"{size}-dense.yaml").model


def model_config(shape: str) -> ModelConfig:
    """Return the MoLE model of a name in `SHAPES`: its experts are as wide as its shared expert."""
    size, experts = shape.removesuffix("e").split("-")
    dense = dense_config(size)
    return replace(dense, num_experts=int(experts), expert_intermediate_size=dense.intermediate_size)


@dataclass
class Timings:
    """Seconds of each contender, one per round, in the same order of rounds."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def percentile(self, name: str, percent: float) -> float:
        """Nearest-rank percentile of a contender's seconds."""
        ranked = sorted(self.seconds[name])
        return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))]

    def ratio(self, name: str, reference: str) -> float:
        """Median over rounds of the ratio of two contenders' seconds."""
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return statistics.median(one / other for one, other in pairs)

    def interval(self, name: str, reference: str) -> tuple[float, float]:
        """Return the 95 % interval of `ratio`: order statistics, without an assumption on the distribution."""
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        ranked = sorted(one / other for one, other in pairs)
        return median_interval(ranked)

    def describe(self, name: str, reference: str) -> str:
        """Return the ratio of two contenders with its interval."""
        low, high = self.interval(name, reference)
        return f"{self.ratio(name, reference):.3g} ({low:.3g} to {high:.3g})"

    def target(self, title: str, name: str, reference: str, limit: float) -> "Target":
        """Return the target that one contender takes at most `limit` times as long as another."""
        interval = self.interval(name, reference)
        return Target(f"{title}{name} over {reference}", self.ratio(name, reference), limit, interval=interval)

    def difference(self, name: str, reference: str) -> float:
        """Median over rounds of the difference of two contenders' seconds."""
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return statistics.median(one - other for one, other in pairs)


def median_interval(ranked: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of the median of a population from sorted values of it; from few values, their range.

    The k-th smallest and the k-th largest of n values enclose the median with probability 1 - 2 P(X < k), where X is
    binomial with n and 1/2.
    """
    count, outside, skipped = len(ranked), 0.0, 0
    while skipped < count // 2:
        outside += 2 * math.comb(count, skipped) / 2**count
        if outside > 1 - confidence:
            break
        skipped += 1
    first = max(0, skipped - 1)
    return ranked[first], ranked[count - 1 - first]


def take_turns(
    contenders: Mapping[str, Callable[[int], Value]], rounds: int, advance: Advance
) -> dict[str, list[Value]]:
    """Call each contender once per round with the round's number, in a new random order each; return its results."""
    results: dict[str, list[Value]] = {name: [] for name in contenders}
    order = random.Random(0)
    for turn in range(rounds):
        for name in order.sample(list(contenders), len(contenders)):
            results[name].append(contenders[name](turn))
        advance(1)
    return results


def count_waits(work: Callable[[], object], device: torch.device) -> int | None:
    """Return how often `work` waits for a CUDA device to learn a value; None for others, which are not watched."""
    if device.type != "cuda":
        work()
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def run_rounds(contenders: Mapping[str, Callable[[int], float]], rounds: int, advance: Advance) -> Timings:
    """Let contenders that return their seconds take turns."""
    return Timings(take_turns(contenders, rounds, advance))


@dataclass(frozen=True)
class Target:
    """A figure that should hold, and whether it does."""

    name: str
    found: float
    limit: float
    at_least: bool = False
    interval: tuple[float, float] | None = None
    """Of `found`, 95 %."""

    @property
    def holds(self) -> bool:
        return self.found >= self.limit if self.at_least else self.found <= self.limit

    def line(self) -> str:
        sign = ">=" if self.at_least else "<="
        between = "" if self.interval is None else f" ({self.interval[0]:.3g} to {self.interval[1]:.3g})"
        return f"{'holds' if self.holds else 'MISSED'}  {self.name}: {self.found:.3g}{between} {sign} {self.limit:g}"

    def to_dict(self) -> dict[str, object]:
        interval = {} if self.interval is None else {"interval": list(self.interval)}
        return {"name": self.name, "found": self.found, "limit": self.limit, "holds": self.holds, **interval}


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
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def describe_machine(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Return processor or accelerator, cores, memory and versions, without names of hosts or users."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "processor": name,
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def machine_line(machine: dict[str, str | int]) -> str:
    """Return a machine's description in one line."""
    gibibytes = int(machine["memory_bytes"]) / 2**30
    return (
        f"{machine['processor']}, {machine['cores']} cores ({machine['threads']} threads), {gibibytes:.0f} GiB, "
        f"{machine['system']}, Python {machine['python']}, torch {machine['torch']}"
    )


COUNT, BPE_SIZE = number(int, 1, 2**31 - 1), number(int, 257, 2**31 - 1)
"""Types of options that say how many, and how large a byte-level BPE is."""


def add_common_options(options: argparse.ArgumentParser) -> None:
    """Add what to measure, where, and with which text."""
    options.add_argument("--shape", choices=SHAPES, default="160m-4e", help="sizes of the model (default: 160m-4e)")
    options.add_argument("--dtype", choices=tuple(CODECS), default="bfloat16", help="of the table (default: bfloat16)")
    options.add_argument(
        "--directory", type=output_directory, default=Path("runs"), help="disk to measure (default: runs)"
    )
    add_text_options(options)


def add_text_options(options: argparse.ArgumentParser, output: str = "write it, and a plot with the same name") -> None:
    """Add which text is used, and where figures go, with the help `output`."""
    options.add_argument(
        "--corpus", type=expand_home, nargs="+", default=[], help="text files (default: standard library)"
    )
    options.add_argument("--tokenizer", type=input_file, help="tokenizer.json (default: a BPE trained on the corpus)")
    options.add_argument("--output", type=output_file, metavar="FILE.json", help=output)


def report(
    output: Path | None,
    document: Mapping[str, object],
    groups: Mapping[str, Timings],
    checks: Sequence[Target],
    label: str,
    scale: float,
    console: Console,
) -> None:
    """Print a line per target; with an `output`, write every figure as JSON, and a plot of the medians next to it."""
    for check in checks:
        console.print(check.line(), soft_wrap=True)
    if output is None:
        return
    seconds = {name: timings.seconds for name, timings in groups.items()}
    whole = {**document, "seconds": seconds, "targets": [check.to_dict() for check in checks]}
    write_text(output, json.dumps(whole, indent=1) + "\n")
    bars(groups, output.with_suffix(".png"), label, scale)
