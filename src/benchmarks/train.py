"""`python -m src.benchmarks.train`: what a training step of Dense, MoE and MoLE costs, on real text.

Contestants take turns, so that a machine whose speed drifts treats them alike; ratios are medians over rounds.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from src.benchmarks.machine import describe_machine, machine_line
from src.benchmarks.step_timing import Contestant, Parts
from src.benchmarks.training_rounds import paired_ratio, results_table, run_rounds, summarize
from src.cli import parser, run_verb
from src.data.config import DataConfig, TokenizerConfig
from src.data.packed_tokens import prepare_corpus
from src.data.windows import training_windows
from src.errors import UserError
from src.files import atomic_path, write_text
from src.hardware import matmul_rate
from src.model import ModelConfig
from src.train import native_precision

SHAPES = {"160m": (768, 12), "410m": (1024, 16), "1b": (2048, 8), "tiny": (64, 2)}
"""Hidden size and heads of the paper's models, and of one to try the program with; the FFN is four times as wide."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """The batch and what must be said about it: every ratio depends on vocabulary, corpus and window."""

    windows: Tensor
    """(N, T) int64."""
    corpus: str
    vocabulary: int

    @property
    def unique_ids(self) -> int:
        """Distinct ids of all windows."""
        return self.windows.unique().numel()

    def describe(self) -> str:
        """Say what the windows are."""
        count, length = self.windows.shape
        return (
            f"{count} windows of {length:,} tokens from {self.corpus}, vocabulary {self.vocabulary:,}: "
            f"{self.unique_ids:,} distinct ids, {self.windows.numel() / self.unique_ids:.1f}x fewer than tokens"
        )


def read_text(options: argparse.Namespace) -> Text:
    """Take the first training windows of the corpus that the options name."""
    config = DataConfig(
        files=options.files,
        tokenizer=TokenizerConfig(path=options.tokenizer, vocab_size=options.vocab_size),
        sequence_length=options.sequence_length,
        validation_fraction=0.2,  # so that a few files split too
        cache_dir=options.cache_dir,
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
    hidden_size, num_heads = SHAPES[options.shape]
    experts, width = options.experts, 4 * hidden_size
    dense = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        num_layers=options.layers,
        num_heads=num_heads,
        intermediate_size=width,
        max_sequence_length=options.sequence_length,
    )
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
    times, added = run_rounds(contestants, Parts(mole.config, batch[0], dtype), options.rounds)
    pairs = zip(times[mole.name], times["Dense"], added, strict=True)
    return {
        "results": summarize(contestants, times, rate, "Dense"),
        "unique_against_sum_of_parts": statistics.median(
            mine.compute / (base.compute + extra) for mine, base, extra in pairs
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
    times, _ = run_rounds([unique, per_step], None, options.rounds)
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
        times, _ = run_rounds(contestants, None, options.rounds)
        speedup = paired_ratio(times["per_token"], times["unique"])
        points.append({"tokens": batch.numel(), "unique_ids": batch.unique().numel(), "speedup": speedup})
    return points


def plot_sweep(points: Sequence[dict[str, float]], title: str, path: Path) -> None:
    """Draw the speed-up against tokens per micro-batch, beside how many fewer distinct ids there are, into a PNG."""
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
    dtype = torch.bfloat16 if options.device != "cpu" or native_precision() == "bf16-mixed" else None
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
    options.add_argument(
        "--shape", choices=tuple(SHAPES), default="160m", help="widths of a model of the paper (default: 160m)"
    )
    options.add_argument("--layers", type=int, default=2, help="layers of the stack (default: 2)")
    options.add_argument("--experts", type=int, default=4, help="experts of the MoLE (default: 4)")
    options.add_argument("--windows", type=int, default=8, help="windows of a step (default: 8)")
    options.add_argument("--sequence-length", type=int, default=2048, help="tokens of a window (default: 2048)")
    options.add_argument("--rounds", type=int, default=5, help="rounds that every contestant takes (default: 5)")
    options.add_argument("--files", nargs="*", default=[], help="text files; Python's standard library by default")
    options.add_argument("--tokenizer", help="tokenizer.json; a BPE trained on the files by default")
    options.add_argument("--vocab-size", type=int, default=16384, help="entries of that BPE (default: 16384)")
    options.add_argument("--cache-dir", default=".cache/data", help="where tokenized text is kept")
    options.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write every figure as JSON")
    options.add_argument("--plot", type=Path, metavar="FILE", help="also measure growing micro-batches and draw a PNG")
    return options.parse_args(arguments)


if __name__ == "__main__":
    run_verb(main)
