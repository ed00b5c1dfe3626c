"""`python -m src.benchmarks.loss`: what the vocabulary loss costs, forward and backward, against the plain one.

Both run under bfloat16 autocast on the same hidden states and on targets from real text; the three matrix products that
no such loss can avoid are timed alone as a reference.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from src.benchmarks.common import (
    BPE_SIZE,
    COUNT,
    Target,
    Timings,
    add_text_options,
    describe_machine,
    machine_line,
    report,
    run_rounds,
)
from src.benchmarks.memory_use import peak_bytes
from src.benchmarks.workload import load_text_ids
from src.cli import parser, run_verb
from src.model.loss import next_token_loss
from src.system.console import progress_bar
from src.system.hardware import keep_freed_memory

OURS, PLAIN, PRODUCTS = "in chunks", "plain", "three matrix products"
Work = Callable[[], object]


def contenders(hidden_size: int, vocab_size: int, targets: Tensor) -> dict[str, Work]:
    """Return what is compared, for `targets` (N,) int64."""
    torch.manual_seed(0)
    hidden = torch.randn(1, len(targets), hidden_size, requires_grad=True)
    head = nn.Linear(hidden_size, vocab_size, bias=False)
    inputs, weight = hidden.detach()[0].bfloat16(), head.weight.detach().bfloat16()

    def plain(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten())

    def step(loss: Callable[[Tensor, nn.Linear, Tensor], Tensor]) -> None:
        hidden.grad = head.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(hidden, head, targets.unsqueeze(0))
        value.backward()

    def products() -> None:
        logits = inputs @ weight.T  # (N, V)
        _ = logits @ weight, logits.T @ inputs

    return {OURS: lambda: step(next_token_loss), PLAIN: lambda: step(plain), PRODUCTS: products}


def measure(works: dict[str, Work], rounds: int) -> tuple[Timings, dict[str, int]]:
    """Time every contender in turns, then measure the memory that each takes above what was there."""

    def timed(work: Work) -> Callable[[int], float]:
        def one(_: int) -> float:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start

        return one

    for work in works.values():
        work()
    with progress_bar("rounds", rounds) as advance:
        timings = run_rounds({name: timed(work) for name, work in works.items()}, rounds, advance)
    peaks = {name: peak_bytes(work, torch.device("cpu")) for name, work in works.items()}
    return timings, {name: peak for name, peak in peaks.items() if peak is not None}


def checks(timings: Timings, peaks: dict[str, int]) -> list[Target]:
    """Compare with what this project promises."""
    found = [
        Target("in chunks over plain, time", timings.ratio(OURS, PLAIN), 1.0),
        Target("in chunks over the three products alone, time (an aim)", timings.ratio(OURS, PRODUCTS), 1.5),
    ]
    if peaks:
        found.append(Target("in chunks over plain, memory", peaks[OURS] / peaks[PLAIN], 0.25))
    return found


def print_figures(timings: Timings, peaks: dict[str, int], console: Console) -> None:
    """Print one table."""
    table = Table("vocabulary loss", "median ms", "over plain", "memory above")
    for name in timings.seconds:
        memory = f"{peaks[name] / 2**20:,.0f} MiB" if name in peaks else ""
        table.add_row(name, f"{1e3 * timings.median(name):,.0f}", f"{timings.ratio(name, PLAIN):.2f}", memory)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print and write."""
    given = _options(arguments)
    keep_freed_memory()  # as training does
    text = load_text_ids(given.corpus, given.tokenizer, given.vocab_size)
    targets = text.window(given.tokens)
    timings, peaks = measure(contenders(given.hidden_size, given.vocab_size, targets), given.rounds)
    console, machine, found = Console(), describe_machine(), checks(timings, peaks)
    console.print(machine_line(machine))
    console.print(f"{given.tokens:,} tokens, hidden size {given.hidden_size}, vocabulary {given.vocab_size:,}")
    print_figures(timings, peaks, console)
    document = {"machine": machine, "tokens": given.tokens, "vocab_size": given.vocab_size, "peak_bytes": peaks}
    report(given.output, document, {"loss": timings}, found, "milliseconds", 1e3, console)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser("benchmarks.loss", __doc__ or "", "python -m src.benchmarks.loss --output results/loss.json")
    options.add_argument("--tokens", type=COUNT, default=4096, help="positions of a micro-batch (default: 4096)")
    options.add_argument("--hidden-size", type=COUNT, default=768, help="default: 768")
    options.add_argument("--vocab-size", type=BPE_SIZE, default=50304, help="default: 50304")
    options.add_argument("--rounds", type=COUNT, default=7, help="interleaved rounds (default: 7)")
    add_text_options(options)
    return options.parse_args(arguments)


if __name__ == "__main__":
    run_verb(main)
