"""`python -m src.benchmarks.build`: how fast a table is built, against what matrix products and the disk allow.

Random weights are written as a run directory and built from there, or kept in memory with `--from model`.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from src.benchmarks.build_measurement import BuildFigures, measure_build
from src.benchmarks.machine import describe_machine, machine_line
from src.cli import parser, run_verb
from src.files import write_text
from src.lut.quantization import CODECS
from src.lut.row_source import RowSource
from src.lut.sources import COMPUTE_DTYPES, open_source
from src.model import ModelConfig, Transformer
from src.run_directory import RunDirectory


class Shape(NamedTuple):
    """Sizes of a model, as the paper names them."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_experts: int
    vocab_size: int

    def config(self) -> ModelConfig:
        """Return the model; its FFNs are four times as wide as the hidden size."""
        width = 4 * self.hidden_size
        return ModelConfig(**self._asdict(), intermediate_size=width, expert_intermediate_size=width)


SHAPES = {
    "small": Shape(2, 256, 4, 4, 8192),
    "160m-4e": Shape(12, 768, 12, 4, 50304),
    "160m-16e": Shape(12, 768, 12, 16, 50304),
    "410m-4e": Shape(24, 1024, 16, 4, 50304),
    "410m-16e": Shape(24, 1024, 16, 16, 50304),
}


def random_source(config: ModelConfig, run: RunDirectory, options: argparse.Namespace) -> RowSource:
    """Draw weights; keep them in memory or leave them in a run directory."""
    torch.manual_seed(0)
    model = Transformer(config)
    if options.source == "model":
        return open_source(model, options.compute_dtype)
    run.write_config({"model": config.to_dict()})
    run.write_weights(model.state_dict())
    return open_source(run, options.compute_dtype)


def print_figures(figures: BuildFigures, title: str, console: Console) -> None:
    """Print throughput, limits and memory."""
    table = Table(title=title, title_justify="left", show_header=False)
    mebibyte = 2**20
    for name, value in (
        ("table", f"{figures.table_bytes / 1e9:.2f} GB in {figures.build_seconds:.1f} s"),
        ("throughput", f"{figures.bytes_per_second / 1e6:.1f} MB/s"),
        ("matrix products allow", f"{figures.matmul_limit / 1e6:.1f} MB/s ({figures.matmul_flops / 1e12:.3f} TFLOPS)"),
        ("sequential writes allow", f"{figures.write_bytes_per_second / 1e6:.1f} MB/s"),
        ("share of the slower", f"{figures.ratio:.2f}"),
        ("memory grew by at most", f"{figures.rss_growth_bytes / mebibyte:,.0f} MiB"),
    ):
        table.add_row(name, value)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, build, print, and remove the table again."""
    options = parser("benchmarks.build", __doc__ or "", "python -m src.benchmarks.build --shape 160m-16e")
    options.add_argument("--shape", choices=tuple(SHAPES), default="small", help="sizes of the model (default: small)")
    options.add_argument("--layers", type=int, help="another number of layers")
    options.add_argument("--dtype", choices=tuple(CODECS), default="bfloat16", help="precision (default: bfloat16)")
    options.add_argument("--compute-dtype", choices=tuple(COMPUTE_DTYPES), default="float32", help="default: float32")
    options.add_argument("--from", dest="source", choices=("run", "model"), default="run", help="default: run")
    options.add_argument("--directory", type=Path, default=Path("runs"), help="where to build (default: runs)")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write every figure as JSON")
    given = options.parse_args(arguments)
    shape = SHAPES[given.shape]
    config = shape._replace(num_layers=given.layers or shape.num_layers).config()
    given.directory.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="build-benchmark-", dir=given.directory))
    try:
        source = random_source(config, RunDirectory(place), given)
        figures = measure_build(source, config, place / "lut", dtype=given.dtype, compute_dtype=given.compute_dtype)
    finally:
        shutil.rmtree(place)
    machine = describe_machine()
    title = f"{given.shape}, {config.num_layers} layers, {given.dtype}, computed in {given.compute_dtype}"
    print_figures(figures, f"{title}, from a {given.source}\n{machine_line(machine)}", Console())
    if given.json is not None:
        rates = {name: getattr(figures, name) for name in ("bytes_per_second", "matmul_limit", "ratio")}
        document = {"machine": machine, "model": config.to_dict(), "from": given.source, **asdict(figures), **rates}
        write_text(given.json, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    run_verb(main)
