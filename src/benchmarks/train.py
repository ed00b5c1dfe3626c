"""`python -m src.benchmarks.train`: what a training step of Dense, MoE and MoLE costs, on real text.

A step is timed by phase. Contestants take turns, so that a machine whose speed drifts treats them alike; ratios are
medians over rounds. The layer stack has no vocabulary head, which is the same for every contestant and would hide what
differs.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from src.accounting.flops import count_computed_ids, step_flops
from src.benchmarks.common import (
    BPE_SIZE,
    COUNT,
    SIZES,
    Value,
    dense_config,
    describe_machine,
    machine_line,
    take_turns,
)
from src.benchmarks.memory_use import peak_bytes
from src.cli import add_device_option, input_file, number, output_directory, output_file, parser, run_verb
from src.data.config import DataConfig, TokenizerConfig
from src.data.files import expand_files
from src.data.packed_corpus import prepare_corpus
from src.data.tokenizer import load_tokenizer
from src.data.windows import PADDED_IDS, find_distinct, training_windows
from src.errors import UserError, caused_by
from src.model import ModelConfig, Transformer
from src.model.experts import LayerExperts, mix
from src.model.loss import next_token_loss
from src.model.router import Routing, router_probs
from src.model.step_rows import StepRows
from src.system.console import progress_bar
from src.system.files import atomic_path, expand_home, write_text
from src.system.hardware import matmul_rate, native_precision, synchronize

PARTS = "added parts"


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of one step, by phase."""

    forward: float
    backward: float
    optimizer: float

    @property
    def compute(self) -> float:
        return self.forward + self.backward

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.optimizer


Phase = Callable[[str, Callable[[], Any]], Any]
"""Does a part of a step, whose phase it is told, and returns the result."""


def run_at_once(_phase: str, work: Callable[[], Any]) -> Any:
    """Do the work and nothing else."""
    return work()


class Parts:
    """What MoLE adds to Dense, each alone: the experts on the distinct ids of a micro-batch, and the mixture."""

    def __init__(self, config: ModelConfig, token_ids: Tensor, dtype: torch.dtype | None) -> None:
        """Prepare one layer for `token_ids` (B, T) int64."""
        torch.manual_seed(0)
        ids, self._inverse = token_ids.unique(return_inverse=True)
        self._layers, self._dtype = config.num_layers, dtype
        self._experts = LayerExperts(config).to(token_ids.device)
        for parameter in self._experts.parameters():
            torch.nn.init.normal_(parameter, std=config.init_std)
        self._embeddings = torch.randn(len(ids), config.hidden_size, device=token_ids.device, requires_grad=True)
        shape = (*token_ids.shape, config.num_experts)
        self._logits = torch.randn(shape, device=token_ids.device, requires_grad=True)
        self._rows = self._run_experts().detach().requires_grad_()  # (U, E, D)

    def step(self) -> StepTimes:
        seconds = [self._timed(work) for work in (self._run_experts, self._run_mixture)]
        forward, backward = (self._layers * sum(phase) for phase in zip(*seconds, strict=True))
        return StepTimes(forward=forward, backward=backward, optimizer=0.0)

    def _run_experts(self) -> Tensor:
        with _autocast(self._embeddings.device, self._dtype):
            return self._experts(self._embeddings)

    def _run_mixture(self) -> Tensor:
        return mix(self._rows, Routing(self._logits, router_probs(self._logits), None), self._inverse)

    def _timed(self, work: Callable[[], Tensor]) -> tuple[float, float]:
        forward, output = timed(work, self._embeddings.device)
        gradient = torch.ones_like(output)
        backward, _ = timed(partial(output.backward, gradient), self._embeddings.device)
        return forward, backward


class Contestant:
    """A model and the micro-batches of its step; as in training, their distinct ids were found with the data."""

    def __init__(
        self, name: str, config: ModelConfig, batch: Tensor, dtype: torch.dtype | None, *, with_head: bool = False
    ) -> None:
        """Build the model on the device of `batch` (A, B, T) int64; `dtype` is autocast's, None computes in float32.

        `with_head` the loss is that of next tokens, otherwise of nothing.
        """
        self.name, self.config, self.batch, self.dtype, self._with_head = name, config, batch, dtype, with_head
        torch.manual_seed(0)
        with batch.device:
            self.model = Transformer(config)
        self.model.head.requires_grad_(with_head)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, fused=True)
        windows = torch.cat((batch, batch[..., :1]), dim=-1)  # (A, B, T+1): a last target, as good as any
        multiple = PADDED_IDS if batch.device.type == "cuda" else 1
        self._given = find_distinct(windows.cpu(), config.rows_once_per, multiple).to(batch.device)

    def run(self, phase: Phase = run_at_once) -> None:
        """Take a step, each part of it through `phase`; nothing here waits for the device."""
        shared: StepRows | None = None
        if self.config.expert_execution == "unique_per_step":
            shared = phase("forward", self._share_rows)
        for index in range(len(self.batch)):
            loss = phase("forward", partial(self._loss, index, shared))
            phase("backward", loss.backward)
        phase("optimizer", self.optimizer.step)
        self.optimizer.zero_grad()

    def step(self) -> StepTimes:
        seconds = defaultdict[str, float](float)

        def phase(name: str, work: Callable[[], Any]) -> Any:
            taken, result = timed(work, self.batch.device)
            seconds[name] += taken
            return result

        self.run(phase)
        return StepTimes(**seconds)

    def peak_bytes(self) -> int | None:
        self.step()
        return peak_bytes(self.step, self.batch.device)

    def _share_rows(self) -> StepRows:
        with _autocast(self.batch.device, self.dtype):
            return StepRows(self.model, self.batch, self._given.distinct())

    def _loss(self, index: int, shared: StepRows | None) -> Tensor:
        rows = None if shared is None else shared.micro_batch(index)
        distinct = self._given.distinct(index) if shared is None else None
        with _autocast(self.batch.device, self.dtype):
            hidden_states = self.model.trunk(self.batch[index], expert_rows=rows, distinct=distinct).hidden_states
            if self._with_head:
                loss = next_token_loss(hidden_states, self.model.head, self._given[index][:, 1:])
            else:
                loss = hidden_states.float().square().mean()
        return loss + shared.carried() if shared is not None and index + 1 == len(self.batch) else loss


def timed(work: Callable[[], Value], device: torch.device) -> tuple[float, Value]:
    """Run `work` and return its seconds, the device's included, and its result."""
    started = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - started, result


def _autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One contestant over all rounds; medians."""

    name: str
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    tokens_per_second: float
    model_flops_utilization: float
    """Of the matrix-product rate measured in the same run, at the operations truly executed."""
    peak_bytes: int | None
    against_baseline: float
    """Forward and backward against the baseline's of the same round."""


def measure(contestants: Sequence[Contestant], rounds: int, parts: Parts | None = None) -> dict[str, list[StepTimes]]:
    """Let the contestants, and the parts as `PARTS`, take turns; return their times, round by round."""
    for contestant in contestants:
        contestant.step()  # the first step allocates
    steps: dict[str, Callable[[], StepTimes]] = {contestant.name: contestant.step for contestant in contestants}
    if parts is not None:
        steps[PARTS] = parts.step
    with progress_bar("rounds", rounds) as advance:
        return take_turns({name: lambda _, step=step: step() for name, step in steps.items()}, rounds, advance)


def paired_ratio(numerator: Sequence[StepTimes], denominator: Sequence[StepTimes]) -> float:
    """Median over rounds of the ratio of forward and backward seconds."""
    pairs = zip(numerator, denominator, strict=True)
    return statistics.median(mine.compute / theirs.compute for mine, theirs in pairs)


def summarize(
    contestants: Sequence[Contestant], times: dict[str, list[StepTimes]], rate: float, baseline: str
) -> list[StepResult]:
    """Turn times into medians and paired ratios; measures peak memory with one more step each."""
    return [_summarize(contestant, times[contestant.name], times[baseline], rate) for contestant in contestants]


def _summarize(contestant: Contestant, times: list[StepTimes], baseline: list[StepTimes], rate: float) -> StepResult:
    tokens = contestant.batch.numel()
    step = statistics.median(item.total for item in times)
    compute = statistics.median(item.compute for item in times)
    config, computed_ids = contestant.config, count_computed_ids(contestant.config, contestant.batch)
    return StepResult(
        name=contestant.name,
        forward_seconds=statistics.median(item.forward for item in times),
        backward_seconds=statistics.median(item.backward for item in times),
        optimizer_seconds=statistics.median(item.optimizer for item in times),
        tokens_per_second=tokens / step,
        model_flops_utilization=step_flops(config, contestant.batch.shape, computed_ids, head=False) / compute / rate,
        peak_bytes=contestant.peak_bytes(),
        against_baseline=paired_ratio(times, baseline),
    )


def results_table(results: Sequence[StepResult], title: str, baseline: str) -> Table:
    """Return the results as a table."""
    table = Table(title=title, title_justify="left")
    table.caption = f"fwd, bwd, step: seconds forward, backward, of the optimizer; over {baseline}: fwd + bwd"
    for heading in ("", "fwd", "bwd", "step", "tokens/s", "MFU", "peak MiB", f"over {baseline}"):
        table.add_column(heading, justify="right" if heading else "left")
    for result in results:
        table.add_row(
            result.name,
            f"{result.forward_seconds:.2f}",
            f"{result.backward_seconds:.2f}",
            f"{result.optimizer_seconds:.2f}",
            f"{result.tokens_per_second:,.0f}",
            f"{result.model_flops_utilization:.0%}",
            "" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:,.0f}",
            f"{result.against_baseline:.2f}",
        )
    return table


@dataclass(frozen=True, kw_only=True)
class Text:
    """The batch and where it comes from: every ratio depends on vocabulary, corpus and window."""

    windows: Tensor
    """(N, T) int64."""
    corpus: str
    vocabulary: int

    @property
    def unique_ids(self) -> int:
        return self.windows.unique().numel()

    def describe(self) -> str:
        count, length = self.windows.shape
        return (
            f"{count} windows of {length:,} tokens from {self.corpus}, vocabulary {self.vocabulary:,}: "
            f"{self.unique_ids:,} distinct ids, {self.windows.numel() / self.unique_ids:.1f}x fewer than tokens"
        )


def read_text(options: argparse.Namespace) -> Text:
    """Take the first training windows of the corpus that the options name."""
    expand_files(options.files, "--files")  # names what is not there
    if options.tokenizer is not None:
        with caused_by("--tokenizer"):
            load_tokenizer(options.tokenizer)
    config = DataConfig(
        files=options.files,
        tokenizer=TokenizerConfig(path=options.tokenizer and str(options.tokenizer), vocab_size=options.vocab_size),
        sequence_length=options.sequence_length,
        validation_fraction=0.2,  # so that a few files split too
        cache_dir=str(options.cache_dir),
    )
    corpus = prepare_corpus(config)
    samples = np.arange(options.windows, dtype=np.int64)
    windows = training_windows(corpus.tokens("train"), options.sequence_length, samples, seed=0)[:, :-1]
    if windows.unique().numel() < 2:
        raise UserError("--files: the windows hold one repeated token, which measures nothing; give real text")
    name = " ".join(options.files) or "the standard library of Python"
    return Text(windows=windows, corpus=name, vocabulary=corpus.tokenizer.get_vocab_size())


def model_configs(options: argparse.Namespace, vocabulary: int) -> dict[str, ModelConfig]:
    """Dense, MoE and MoLE of equal resident parameters, as the paper pairs them."""
    experts, whole = options.experts, dense_config(options.shape)
    width, length = whole.intermediate_size, options.sequence_length
    dense = replace(whole, vocab_size=vocabulary, num_layers=options.layers, max_sequence_length=length)
    moe = replace(
        dense,
        intermediate_size=0,
        num_experts=2 * experts + 2,
        expert_intermediate_size=width // 2,
        expert_input="hidden",
        top_k=2,
    )
    mole = replace(dense, num_experts=experts, expert_intermediate_size=width)
    return {
        "Dense": dense,
        f"MoE-{2 * experts + 2}E": moe,
        f"MoLE-{experts}E per_token": replace(mole, expert_execution="per_token"),
        f"MoLE-{experts}E unique": mole,
    }


def compare_forms(options: argparse.Namespace, text: Text, dtype: torch.dtype | None, rate: float) -> dict[str, Any]:
    """Dense, MoE and MoLE on all windows as one micro-batch, and MoLE against the sum of its parts."""
    batch = text.windows.unsqueeze(0).to(options.device)  # (1, N, T)
    configs = model_configs(options, text.vocabulary)
    contestants = [Contestant(name, config, batch, dtype) for name, config in configs.items()]
    *_, per_token, mole = contestants
    times = measure(contestants, options.rounds, Parts(mole.config, batch[0], dtype))
    triples = zip(times[mole.name], times["Dense"], times[PARTS], strict=True)
    return {
        "results": summarize(contestants, times, rate, "Dense"),
        "unique_against_sum_of_parts": statistics.median(
            mine.compute / (base.compute + parts.compute) for mine, base, parts in triples
        ),
        "per_token_against_unique": paired_ratio(times[per_token.name], times[mole.name]),
    }


def compare_accumulation(
    options: argparse.Namespace, text: Text, dtype: torch.dtype | None, rate: float
) -> dict[str, Any]:
    """Experts once per micro-batch against once per step, each window a micro-batch."""
    batch = text.windows.unsqueeze(1).to(options.device)  # (N, 1, T)
    *_, mole = model_configs(options, text.vocabulary).values()
    name = f"MoLE-{mole.num_experts}E"
    unique = Contestant(f"{name} unique", mole, batch, dtype)
    per_step = Contestant(f"{name} unique_per_step", replace(mole, expert_execution="unique_per_step"), batch, dtype)
    times = measure([unique, per_step], options.rounds)
    return {
        "results": summarize([unique, per_step], times, rate, unique.name),
        "unique_against_unique_per_step": paired_ratio(times[unique.name], times[per_step.name]),
    }


def sweep(options: argparse.Namespace, text: Text, dtype: torch.dtype | None) -> list[dict[str, float]]:
    """How much faster `unique` is than `per_token` as the micro-batch grows: 1, 2, 4, ... windows."""
    *_, (_, per_token), (_, unique) = model_configs(options, text.vocabulary).items()
    points: list[dict[str, float]] = []
    for power in range(len(text.windows).bit_length()):
        batch = text.windows[None, : 2**power].to(options.device)
        contestants = [Contestant(config.expert_execution, config, batch, dtype) for config in (per_token, unique)]
        times = measure(contestants, options.rounds)
        speedup = paired_ratio(times["per_token"], times["unique"])
        points.append({"tokens": batch.numel(), "unique_ids": batch.unique().numel(), "speedup": speedup})
    return points


def plot_sweep(points: Sequence[dict[str, float]], title: str, path: Path) -> None:
    """Draw the speed-up and the ratio of tokens to distinct ids against tokens per micro-batch, into a PNG."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    tokens = [point["tokens"] for point in points]
    axes.plot(tokens, [point["speedup"] for point in points], "o-", label="per_token / unique, forward and backward")
    axes.plot(tokens, [point["tokens"] / point["unique_ids"] for point in points], "s:", label="tokens / distinct ids")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens per micro-batch", ylabel="times", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print and write."""
    options = _options(arguments)
    console, machine = Console(), describe_machine(options.device)
    text = read_text(options)
    dtype = torch.bfloat16 if options.device != "cpu" or native_precision("cpu") == "bf16-mixed" else None
    rate = matmul_rate(dtype or torch.float32, torch.device(options.device))
    console.print(machine_line(machine), text.describe(), sep="\n")
    console.print(f"{options.layers} layers of the {options.shape} shape, {dtype or torch.float32}, no vocabulary head")
    console.print(f"matrix products reach {rate / 1e12:.2f} TFLOP/s here\n")
    forms = compare_forms(options, text, dtype, rate)
    console.print(results_table(forms["results"], "one micro-batch", "Dense"))
    console.print(f"unique takes {forms['unique_against_sum_of_parts']:.2f}x the sum of its parts,")
    console.print(f"and per_token {forms['per_token_against_unique']:.2f}x unique (medians of paired ratios)\n")
    accumulated = compare_accumulation(options, text, dtype, rate)
    console.print(results_table(accumulated["results"], f"{len(text.windows)} accumulated micro-batches", "unique"))
    console.print(f"unique takes {accumulated['unique_against_unique_per_step']:.2f}x unique_per_step")
    points = sweep(options, text, dtype) if options.plot is not None else []
    if options.plot is not None:
        plot_sweep(points, f"MoLE-{options.experts}E, {options.layers} layers of {options.shape}", options.plot)
    if options.json is not None:
        record: dict[str, Any] = {"machine": machine, "text": text.describe(), "rounds": options.rounds}
        record |= {"matmul_flops": rate, "one_micro_batch": _plain(forms), "accumulated": _plain(accumulated)}
        record["sweep"] = points
        write_text(options.json, json.dumps(record, indent=1) + "\n")


def _plain(measured: dict[str, Any]) -> dict[str, Any]:
    return {**measured, "results": [asdict(result) for result in measured["results"]]}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser("benchmarks.train", __doc__ or "", "python -m src.benchmarks.train --shape 160m --experts 16")
    options.add_argument("--shape", choices=SIZES, default="160m", help="widths of a paper's model (default: 160m)")
    options.add_argument("--layers", type=number(int, 1, 4096), default=2, help="layers of the stack (default: 2)")
    options.add_argument("--experts", type=COUNT, default=4, help="experts of the MoLE (default: 4)")
    options.add_argument("--windows", type=COUNT, default=8, help="windows of a step (default: 8)")
    options.add_argument("--sequence-length", type=COUNT, default=2048, help="tokens of a window (default: 2048)")
    options.add_argument("--rounds", type=COUNT, default=5, help="rounds that every contestant takes (default: 5)")
    options.add_argument(
        "--files", type=expand_home, nargs="*", default=[], help="text files; Python's standard library by default"
    )
    options.add_argument("--tokenizer", type=input_file, help="tokenizer.json; a BPE trained on the files by default")
    options.add_argument("--vocab-size", type=BPE_SIZE, default=16384, help="entries of that BPE (default: 16384)")
    options.add_argument(
        "--cache-dir", type=output_directory, default=Path(".cache/data"), help="where tokenized text is kept"
    )
    add_device_option(options)
    options.add_argument("--json", type=output_file, metavar="FILE", help="also write every figure as JSON")
    options.add_argument(
        "--plot", type=output_file, metavar="FILE", help="also measure growing micro-batches and draw a PNG"
    )
    return options.parse_args(arguments)


if __name__ == "__main__":
    run_verb(main)
