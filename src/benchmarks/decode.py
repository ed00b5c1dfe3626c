"""`python -m src.benchmarks.decode`: milliseconds per step of MoLE from disk, against Dense and the table in memory.

Random weights of a paper shape in bfloat16; ids come from real text and are distinct within a step. A step runs from
sampling, when the next rows are requested, to the next sampling, and every contender takes the same step in turn:
Dense; MoLE computing its experts; the table in memory; on disk with warm pages, with the page cache dropped before the
step, and with a row cache. All share one backbone, so that they differ in nothing else.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from src.benchmarks import page_cache
from src.benchmarks.decode_contenders import (
    MATMULS,
    PROMPT_TOKENS,
    Contenders,
    matmul_weights,
    measure_decode,
    measure_prefill,
    read_bandwidth,
)
from src.benchmarks.machine import machine_line
from src.benchmarks.memory_use import anonymous_bytes
from src.benchmarks.random_run import scratch_directory, write_runs
from src.benchmarks.results import add_common_options, describe_run, print_targets, write_results
from src.benchmarks.rounds import Target, Timings
from src.benchmarks.shapes import model_config
from src.benchmarks.text_ids import TextIds, load_text_ids
from src.cli import parser, run_verb

Memory = dict[str, dict[int, int]]
"""Peak anonymous bytes by form and batch."""


def targets(decode: Mapping[int, Timings], prefills: Timings, memory: Memory) -> list[Target]:
    """Compare with what this project promises for 160M-4E on 2 cores."""
    found: list[Target] = []
    for batch, timings in decode.items():
        for name, reference, limit in (
            ("disk, cold", "table in RAM", 1.03),
            ("disk, cold", "dense", 1.06),
            ("disk, warm", "table in RAM", 1.02),
        ):
            found.append(Target(f"batch {batch}: {name} over {reference}", timings.ratio(name, reference), limit))
        if batch == 1:
            found.append(Target("batch 1: dense over its matmuls alone", timings.ratio("dense", MATMULS), 1.3))
    found.append(Target("prefill: disk, cold over dense", prefills.ratio("disk, cold", "dense"), 1.15))
    for batch, limit in ((1, 96), (32, 320)):
        if batch in memory.get("disk", {}):
            above = (memory["disk"][batch] - memory["dense"][batch]) / 2**20
            found.append(Target(f"batch {batch}: anonymous MiB of disk above dense, peak", above, limit))
    return found


def print_timings(title: str, timings: Timings, console: Console) -> None:
    """Print one table: medians, tails, and ratios to Dense within each round."""
    table = Table("contender", "median ms", "p99 ms", "over dense", title=title)
    for name in timings.seconds:
        milliseconds = f"{1e3 * timings.median(name):.2f}", f"{1e3 * timings.percentile(name, 99):.2f}"
        table.add_row(name, *milliseconds, f"{timings.ratio(name, 'dense'):.3f}")
    console.print(table)


def measure_memory(runs: Mapping[str, Path], batches: Sequence[int], text: TextIds) -> Memory:
    """Return peak anonymous bytes of each run at each batch, every one in a process of its own."""
    return {
        name: {batch: anonymous_bytes(run, batch, text.held_out) for batch in batches} for name, run in runs.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print, and write JSON and a plot."""
    example = "python -m src.benchmarks.decode --shape 160m-4e --batches 1 8 32 --output results/decode.json"
    options = parser("benchmarks.decode", __doc__ or "", example)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="default: 1 8 32")
    options.add_argument("--rounds", type=int, default=25, help="interleaved rounds (default: 25)")
    options.add_argument("--prefill-rounds", type=int, default=15, help="the same for prompts (default: 15)")
    add_common_options(options)
    given = options.parse_args(arguments)
    config = model_config(given.shape)
    text = load_text_ids(given.corpus, given.tokenizer, config.vocab_size)
    with scratch_directory(given.directory) as directory, ExitStack() as stack:
        mole, dense = write_runs(directory, config, given.dtype, text.counts)
        memory = measure_memory({"dense": dense, "disk": mole}, given.batches, text)
        contenders, before = Contenders(stack, mole, dense), page_cache.bytes_read()
        decode = {batch: measure_decode(contenders, text, batch, given.rounds) for batch in given.batches}
        prefills = measure_prefill(contenders, text, given.prefill_rounds)
        header = describe_run(given, disk_read_bytes=page_cache.bytes_read() - before)
        bandwidth, hit_rate = read_bandwidth(), contenders.hit_rate
        weight_bytes = sum(weight.nbytes for weight in matmul_weights(contenders.models["dense"]))
    fraction = weight_bytes / decode[given.batches[0]].median(MATMULS) / bandwidth
    console, checks = Console(), targets(decode, prefills, memory)
    console.print(f"{machine_line(header['machine'])}\n{given.shape}, table in {given.dtype}")
    console.print(f"disk read {header['disk_read_bytes']:,} bytes; row cache hit rate {hit_rate:.3f}")
    console.print(f"matmuls alone read weights at {fraction:.2f} of this memory's {bandwidth / 1e9:.0f} GB/s")
    print_figures(decode, prefills, memory, console)
    print_targets(checks, console)
    if given.output is not None:
        groups = {**{f"batch {batch}": timings for batch, timings in decode.items()}, "prefill": prefills}
        document = {**header, "hit_rate": hit_rate, "anonymous_bytes": memory, "matmul_bandwidth_fraction": fraction}
        write_results(given.output, document, groups, checks, "milliseconds", 1e3)


def print_figures(decode: Mapping[int, Timings], prefills: Timings, memory: Memory, console: Console) -> None:
    """Print a table per batch, one for prompts, and the memory of each form."""
    for batch, timings in decode.items():
        print_timings(f"a decode step, batch {batch}, after {PROMPT_TOKENS} tokens", timings, console)
    print_timings(f"a prompt of {PROMPT_TOKENS} tokens", prefills, console)
    for name, by_batch in memory.items():
        peaks = ", ".join(f"{peak / 2**20:,.0f} MiB at batch {batch}" for batch, peak in by_batch.items())
        console.print(f"anonymous memory, peak, {name}: {peaks}")


if __name__ == "__main__":
    run_verb(main)
