"""`python -m src.benchmarks.gpu`: steps of training and of decoding on one GPU, within a few minutes.

Dense, MoE and MoLE of one size take whole training steps, with the vocabulary's head, eager and compiled, one after the
other: a GPU holds its speed, and not all of them at once. Then Dense and MoLE decode, with the table on disk, in the
host's memory and on the GPU. Where minutes are few, there are fewer rounds, then fewer cells.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from src.accounting.flops import count_computed_ids, step_flops
from src.benchmarks.common import (
    COUNT,
    SIZES,
    Timings,
    add_text_options,
    count_waits,
    dense_config,
    describe_machine,
    machine_line,
    model_config,
)
from src.benchmarks.decode import Contenders, filled_cache, measure_decode, print_timings
from src.benchmarks.memory_use import peak_bytes
from src.benchmarks.train import Contestant, model_configs, timed
from src.benchmarks.workload import TextIds, decode_step, load_text_ids, scratch_directory, write_runs
from src.cli import add_device_option, number, output_directory, parser, run_verb
from src.inference import InferenceModel, load_model
from src.inference.disk_experts import DiskExperts
from src.lut import LutStore
from src.model import ModelConfig
from src.system.files import write_text
from src.system.hardware import matmul_rate, native_precision

Figures = TypeVar("Figures")
LEAST_ROUNDS, MOST_ROUNDS = 3, 50


class Budget:
    """Shares some minutes among cells: each gets as many rounds as its share holds, and the last ones may get none."""

    def __init__(self, minutes: float, cells: int) -> None:
        self._end, self._cells = time.monotonic() + 60 * minutes, cells
        self._longest_start = 0.0
        self.left_out: dict[str, str] = {}
        """Cells without figures, and why."""

    def cell(self, name: str, begin: Callable[[], Callable[[int], Figures]]) -> Figures | None:
        """Return what a cell measures in its rounds. `begin` prepares it; None where there is no time or memory."""
        started, figures = time.monotonic(), None
        if self._end - started < self._longest_start:
            self.left_out[name] = "no time was left"
        else:
            try:
                figures = self._measure(begin, started)
            except torch.OutOfMemoryError:
                self.left_out[name] = "the GPU's memory was too small"
        self._cells -= 1
        return figures

    def _measure(self, begin: Callable[[], Callable[[int], Figures]], started: float) -> Figures:
        measure = begin()
        ready = time.monotonic()
        self._longest_start = max(self._longest_start, ready - started)
        figures = measure(LEAST_ROUNDS)
        now = time.monotonic()
        rounds = min(MOST_ROUNDS, int((self._end - now) / self._cells / max(1e-6, now - ready) * LEAST_ROUNDS))
        return measure(rounds) if rounds > LEAST_ROUNDS else figures


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """A training step; times are medians."""

    name: str
    compiled: bool
    rounds: int
    seconds: float
    tokens_per_second: float
    model_flops_utilization: float
    """Of the matrix-product rate measured in the same run, at the operations truly executed."""
    peak_bytes: int | None
    """Weights, gradients, moments and activations."""
    waits: int | None
    """How often the host waits for the device to learn a value."""


def begin_training(
    name: str, config: ModelConfig, batch: Tensor, dtype: torch.dtype | None, rate: float, *, compiled: bool
) -> Callable[[int], StepFigures]:
    """Build a model, take its first steps, and return what measures others."""
    device, made = batch.device, list[Contestant]()

    def first_steps() -> None:
        made.append(contestant := Contestant(name, config, batch, dtype, with_head=True))
        if compiled:
            torch.compiler.reset()  # what another model has compiled counts towards a limit
            contestant.model.compile_layers()
        for _ in range(2):
            timed(contestant.run, device)

    peak = peak_bytes(first_steps, device)
    (contestant,) = made
    waits = count_waits(contestant.run, device)
    flops = step_flops(config, batch.shape, count_computed_ids(config, batch.cpu()))

    def measure(rounds: int) -> StepFigures:
        seconds = statistics.median(timed(contestant.run, device)[0] for _ in range(rounds))
        return StepFigures(
            name=name,
            compiled=compiled,
            rounds=rounds,
            seconds=seconds,
            tokens_per_second=batch.numel() / seconds,
            model_flops_utilization=flops / seconds / rate,
            peak_bytes=peak,
            waits=waits,
        )

    return measure


def measure_training(options: argparse.Namespace, text: TextIds, budget: Budget, rate: float) -> list[StepFigures]:
    """Measure a step of each model, eager and compiled."""
    device, dtype = torch.device(options.device), _dtype(options.device)
    windows = torch.stack([text.window(options.sequence_length) for _ in range(options.windows)])
    batch, configs = windows.unsqueeze(0).to(device), model_configs(options, dense_config(options.shape).vocab_size)
    found: list[StepFigures | None] = []
    for compiled in (False, True):
        for name, config in configs.items():
            if config.expert_execution == "per_token":
                continue
            label = f"{name.removesuffix(' unique')}, {'compiled' if compiled else 'eager'}"
            begin = partial(begin_training, label, config, batch, dtype, rate, compiled=compiled)
            found.append(budget.cell(label, begin))
            gc.collect()  # the model is part of cycles
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return [figures for figures in found if figures is not None]


@dataclass(frozen=True, kw_only=True)
class DecodeFigures:
    """A decode step of every form."""

    timings: Timings
    waits: dict[str, int | None]


def load_forms(stack: ExitStack, mole: Path, dense: Path, device: torch.device) -> Contenders:
    """Load Dense, and MoLE with its table on disk, in the host's memory and on the device."""

    def load(path: Path, reader: str = "auto") -> InferenceModel:
        return stack.enter_context(load_model(path, reader=reader, device=device))

    models = {"dense": load(dense), "disk, cold": load(mole), "disk, warm": load(mole)}
    models["table in RAM"], models["table on the device"] = load(mole), load(mole, "memory")
    models["table in RAM"].close()
    models["table in RAM"].experts = DiskExperts(LutStore.open(mole / "lut", reader="memory"))
    return Contenders(mole / "lut", models)


def measure_decoding(options: argparse.Namespace, text: TextIds, budget: Budget) -> dict[int, DecodeFigures]:
    """Measure a decode step at each batch size; the first one's start writes the table and loads it."""
    found: dict[int, DecodeFigures] = {}
    with scratch_directory(options.directory) as directory, ExitStack() as stack:
        loaded: list[Contenders] = []

        def begin(batch: int) -> Callable[[int], DecodeFigures]:
            if not loaded:
                config = model_config(f"{options.shape}-{options.experts}e")
                mole, dense = write_runs(directory, config, "bfloat16", text.counts)
                loaded.append(load_forms(stack, mole, dense, torch.device(options.device)))

            def measure(rounds: int) -> DecodeFigures:
                timings = measure_decode(loaded[0], text, batch, rounds)
                return DecodeFigures(timings=timings, waits=count_step_waits(loaded[0], text, batch))

            return measure

        for batch in options.batches:
            if (figures := budget.cell(f"decode, batch {batch}", partial(begin, batch))) is not None:
                found[batch] = figures
    return found


@torch.inference_mode()
def count_step_waits(contenders: Contenders, text: TextIds, batch: int) -> dict[str, int | None]:
    """Count the waits of one decode step of each form, choosing the next ids included."""
    token_ids, found = text.distinct(batch), dict[str, int | None]()
    for name, model in contenders.models.items():
        step = partial(decode_step, model, token_ids, filled_cache(contenders, batch))
        found[name] = count_waits(step, contenders.device)
    return found


def training_table(figures: Sequence[StepFigures]) -> Table:
    """Return the training steps as a table."""
    table = Table(title="a training step, with the head", title_justify="left")
    for heading in ("", "ms", "tokens/s", "MFU", "peak MiB", "waits", "rounds"):
        table.add_column(heading, justify="right" if heading else "left")
    for step in figures:
        table.add_row(
            step.name,
            f"{1e3 * step.seconds:,.1f}",
            f"{step.tokens_per_second:,.0f}",
            f"{step.model_flops_utilization:.1%}",
            "" if step.peak_bytes is None else f"{step.peak_bytes / 2**20:,.0f}",
            "" if step.waits is None else str(step.waits),
            str(step.rounds),
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print and write."""
    options = _options(arguments)
    budget = Budget(options.minutes, 6 + len(options.batches))
    machine, device, console = describe_machine(options.device), torch.device(options.device), Console()
    text = load_text_ids(options.corpus, options.tokenizer, dense_config(options.shape).vocab_size)
    rate = matmul_rate(_dtype(options.device) or torch.float32, device)
    console.print(machine_line(machine))
    console.print(
        f"{options.layers} layers of the {options.shape} shape, {options.windows} windows of "
        f"{options.sequence_length:,} tokens; matrix products reach {rate / 1e12:.2f} TFLOP/s here"
    )
    training = measure_training(options, text, budget, rate)
    console.print(training_table(training))
    decoding = measure_decoding(options, text, budget)
    for batch, figures in decoding.items():
        print_timings(f"a decode step, batch {batch}", figures.timings, console)
        if any(waits is not None for waits in figures.waits.values()):
            console.print("waits of a step: " + ", ".join(f"{name} {waits}" for name, waits in figures.waits.items()))
    for name, reason in budget.left_out.items():
        console.print(f"left out: {name}: {reason}")
    record: dict[str, object] = {"machine": machine, "shape": options.shape, "layers": options.layers}
    record |= {"windows": options.windows, "sequence_length": options.sequence_length, "matmul_flops": rate}
    record |= {"training": [asdict(step) for step in training], "left_out": budget.left_out}
    record["decoding"] = {
        batch: {"seconds": figures.timings.seconds, "waits": figures.waits} for batch, figures in decoding.items()
    }
    write_text(options.output, json.dumps(record, indent=1) + "\n")
    console.print(f"written to {options.output}", soft_wrap=True)


def _dtype(device: str) -> torch.dtype | None:
    return torch.bfloat16 if device != "cpu" or native_precision("cpu") == "bf16-mixed" else None


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser("benchmarks.gpu", __doc__ or "", "python -m src.benchmarks.gpu --minutes 5 --output gpu.json")
    options.add_argument(
        "--minutes", type=number(float, 0.01, 1440), default=5, help="time to stay within (default: 5)"
    )
    options.add_argument("--shape", choices=SIZES, default="160m", help="widths of a paper's model (default: 160m)")
    options.add_argument("--layers", type=number(int, 1, 4096), help="layers that train (default: all of the shape)")
    options.add_argument("--experts", type=COUNT, default=4, help="experts of the MoLE (default: 4)")
    options.add_argument("--windows", type=COUNT, default=8, help="windows of a training step (default: 8)")
    options.add_argument("--sequence-length", type=COUNT, default=2048, help="tokens of a window (default: 2048)")
    options.add_argument("--batches", type=COUNT, nargs="+", default=[1, 8, 32], help="to decode (default: 1 8 32)")
    options.add_argument(
        "--directory", type=output_directory, default=Path("runs"), help="where the table is written (default: runs)"
    )
    add_text_options(options, "JSON file to write (default: results/gpu.json)")
    options.set_defaults(output=Path("results/gpu.json"))
    add_device_option(options, "cuda")
    given = options.parse_args(arguments)
    given.layers = given.layers or dense_config(given.shape).num_layers
    return given


if __name__ == "__main__":
    run_verb(main)
