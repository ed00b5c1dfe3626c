"""`python -m src.benchmarks.build`: how fast a table is built, against what matrix products and the disk allow.

Random weights are written as a run directory and built from there, or kept in memory with `--from model`.

The rate of the same matrix products is sampled before, between chunks and after, so that a machine whose speed drifts
treats both alike; the best of the three counts, since between chunks the disk's thread also uses the processor.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from src.benchmarks.common import SHAPES, describe_machine, machine_line, model_config
from src.benchmarks.memory_use import sampled_peak
from src.cli import number, output_directory, output_file, parser, run_verb
from src.lut import build_lut
from src.lut.codecs import CODECS
from src.lut.plan import plan
from src.lut.sources import COMPUTE_DTYPES, RowSource, open_source, turn_tokens
from src.model import ModelConfig, Transformer
from src.model.experts import ffn_matrices
from src.run_directory import RunDirectory
from src.system.console import Advance, progress_bar
from src.system.files import write_text

_WRITE_BYTES, _WRITE_PIECE_BYTES = 2**30, 64 * 2**20
_MATMULS_PER_CHUNK = 3


@dataclass(frozen=True, kw_only=True)
class BuildFigures:
    """One build, and the limits that were measured with it."""

    table_bytes: int
    build_seconds: float
    matmul_flops: float
    """Floating-point operations a second of the experts' matrix products alone, at the build's shapes and dtype."""
    write_bytes_per_second: float
    """Sequential writes to a file, flushed to the disk."""
    needed_flops: float
    rss_growth_bytes: int
    """Peak resident memory during the build over what it was before, weights in memory included in the latter."""

    @property
    def bytes_per_second(self) -> float:
        return self.table_bytes / self.build_seconds

    @property
    def matmul_limit(self) -> float:
        """Bytes a second if nothing but matrix products took time."""
        return self.table_bytes / (self.needed_flops / self.matmul_flops)

    @property
    def ratio(self) -> float:
        """Throughput over the slower of the two limits."""
        return self.bytes_per_second / min(self.matmul_limit, self.write_bytes_per_second)


@dataclass
class MatmulProbe:
    """Runs one expert's two matrix products and keeps count."""

    config: ModelConfig
    num_tokens: int
    dtype: torch.dtype
    seconds: float = field(default=0.0, init=False)
    """Spent on products between chunks."""
    _flops: float = field(default=0.0, init=False)
    _quiet_rates: list[float] = field(default_factory=list[float], init=False)

    def __post_init__(self) -> None:
        width = self.config.expert_intermediate_size
        self._inputs = torch.randn(self.num_tokens, self.config.hidden_size).to(self.dtype)
        self._up = torch.randn(self.config.hidden_size, width).to(self.dtype)
        self._down = torch.randn(width, self.config.hidden_size).to(self.dtype)
        self._multiply()

    @contextmanager
    def between_chunks(self, description: str, total: int) -> Generator[Advance]:
        """Show a progress bar, and time a few products whenever it advances."""
        with progress_bar(description, total) as advance:

            def advance_and_sample(num_rows: int) -> None:
                seconds, flops = self._timed(_MATMULS_PER_CHUNK)
                self.seconds += seconds
                self._flops += flops
                advance(num_rows)

            yield advance_and_sample

    def sample_alone(self) -> None:
        """Time more of them while nothing else works."""
        seconds, flops = self._timed(10 * _MATMULS_PER_CHUNK)
        self._quiet_rates.append(flops / seconds)

    @property
    def rate(self) -> float:
        return max(self._flops / self.seconds, *self._quiet_rates)

    def _timed(self, count: int) -> tuple[float, float]:
        start = time.perf_counter()
        for _ in range(count):
            self._multiply()
        return time.perf_counter() - start, count * 4.0 * self.num_tokens * self._up.numel()

    def _multiply(self) -> None:
        _ = (self._inputs @ self._up) @ self._down


def measure_build(
    source: RowSource, config: ModelConfig, lut_dir: Path, *, dtype: str, compute_dtype: str
) -> BuildFigures:
    """Build the table in `lut_dir` and measure both limits."""
    build, resident_bytes = plan(source, lut_dir, dtype=dtype), lambda: psutil.Process().memory_info().rss
    num_tokens = min(build.chunk_tokens, turn_tokens(config.expert_intermediate_size, COMPUTE_DTYPES[compute_dtype]))
    probe = MatmulProbe(config, num_tokens, COMPUTE_DTYPES[compute_dtype])
    write_rates = [measure_writes(lut_dir.parent)]
    probe.sample_alone()
    before = resident_bytes()
    with sampled_peak(resident_bytes, 0.02) as peak:
        start = time.perf_counter()
        build_lut(source, lut_dir, dtype=dtype, progress=probe.between_chunks)
        seconds = time.perf_counter() - start - probe.seconds
    probe.sample_alone()
    write_rates.append(measure_writes(lut_dir.parent))
    expert_flops = 2 * len(ffn_matrices(config.activation)) * config.hidden_size * config.expert_intermediate_size
    return BuildFigures(
        table_bytes=build.file_bytes,
        build_seconds=seconds,
        matmul_flops=probe.rate,
        write_bytes_per_second=sum(write_rates) / len(write_rates),
        needed_flops=config.vocab_size * config.num_layers * config.num_experts * expert_flops,
        rss_growth_bytes=max(0, peak[0] - before),
    )


def measure_writes(directory: Path) -> float:
    """Return bytes a second of sequential writes, flushed at the end."""
    piece = os.urandom(_WRITE_PIECE_BYTES)
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        start = time.perf_counter()
        for _ in range(_WRITE_BYTES // _WRITE_PIECE_BYTES):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return _WRITE_BYTES / (time.perf_counter() - start)


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
    for name, value in (
        ("table", f"{figures.table_bytes / 1e9:.2f} GB in {figures.build_seconds:.1f} s"),
        ("throughput", f"{figures.bytes_per_second / 1e6:.1f} MB/s"),
        ("matrix products allow", f"{figures.matmul_limit / 1e6:.1f} MB/s ({figures.matmul_flops / 1e12:.3f} TFLOPS)"),
        ("sequential writes allow", f"{figures.write_bytes_per_second / 1e6:.1f} MB/s"),
        ("share of the slower", f"{figures.ratio:.2f}"),
        ("memory grew by at most", f"{figures.rss_growth_bytes / 2**20:,.0f} MiB"),
    ):
        table.add_row(name, value)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, build, print, and remove the table again."""
    options = parser("benchmarks.build", __doc__ or "", "python -m src.benchmarks.build --shape 160m-16e")
    options.add_argument("--shape", choices=SHAPES, default="small-4e", help="sizes of the model (default: small-4e)")
    options.add_argument("--layers", type=number(int, 1, 4096), help="another number of layers")
    options.add_argument("--dtype", choices=tuple(CODECS), default="bfloat16", help="precision (default: bfloat16)")
    options.add_argument("--compute-dtype", choices=tuple(COMPUTE_DTYPES), default="float32", help="default: float32")
    options.add_argument("--from", dest="source", choices=("run", "model"), default="run", help="default: run")
    options.add_argument(
        "--directory", type=output_directory, default=Path("runs"), help="where to build (default: runs)"
    )
    options.add_argument("--json", type=output_file, metavar="FILE", help="also write every figure as JSON")
    given = options.parse_args(arguments)
    config = model_config(given.shape)
    config = replace(config, num_layers=given.layers or config.num_layers)
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
