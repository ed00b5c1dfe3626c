"""What the inference benchmarks share: their options, what they state about a run, and how they write results."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from rich.console import Console

from src.benchmarks.machine import describe_machine
from src.benchmarks.plots import bars
from src.benchmarks.rounds import Target, Timings
from src.benchmarks.shapes import SHAPES
from src.files import write_text
from src.lut.quantization import CODECS


class Header(TypedDict):
    """What a result was measured on."""

    machine: dict[str, str | int]
    load: tuple[float, float, float]
    shape: str
    dtype: str
    disk_read_bytes: int


def add_common_options(options: argparse.ArgumentParser) -> None:
    """Add what to measure, with which text, and where."""
    options.add_argument("--shape", choices=SHAPES, default="160m-4e", help="sizes of the model (default: 160m-4e)")
    options.add_argument("--dtype", choices=tuple(CODECS), default="bfloat16", help="of the table (default: bfloat16)")
    options.add_argument("--corpus", type=Path, nargs="+", default=[], help="text or .gz (default: standard library)")
    options.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: a BPE trained on the corpus)")
    options.add_argument("--directory", type=Path, default=Path("runs"), help="disk to measure (default: runs)")
    options.add_argument("--output", type=Path, help="write FILE.json, and a plot beside it", metavar="FILE.json")


def describe_run(given: argparse.Namespace, *, disk_read_bytes: int) -> Header:
    """Return the machine, its load now, the shape and what the disk read."""
    return Header(
        machine=describe_machine(),
        load=os.getloadavg(),
        shape=given.shape,
        dtype=given.dtype,
        disk_read_bytes=disk_read_bytes,
    )


def print_targets(checks: Sequence[Target], console: Console) -> None:
    """Print a line per target."""
    for check in checks:
        console.print(check.line(), soft_wrap=True)


def write_results(
    path: Path,
    document: Mapping[str, object],
    groups: Mapping[str, Timings],
    checks: Sequence[Target],
    label: str,
    scale: float,
) -> None:
    """Write every figure as JSON, and a plot of the medians beside it."""
    seconds = {name: timings.seconds for name, timings in groups.items()}
    whole = {**document, "seconds": seconds, "targets": [check.to_dict() for check in checks]}
    write_text(path, json.dumps(whole, indent=1) + "\n")
    bars(groups, path.with_suffix(".png"), label, scale)
