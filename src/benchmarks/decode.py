"""`python -m src.benchmarks.decode`: milliseconds per step of MoLE from disk, against Dense and the table in memory.

Random weights of a paper shape in bfloat16; ids come from real text and are distinct within a step. A step runs from
sampling, when the next rows are requested, to the next sampling, and every contender takes the same step in turn:
Dense; MoLE computing its experts; the table in memory; on disk with warm pages, with the page cache dropped before the
step, and with a row cache; MoE with its experts in memory and on disk (`src.benchmarks.moe`). All share one backbone,
so that they differ in nothing else.

B batch.
"""

import copy
import os
import time
import timeit
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from src.benchmarks import workload
from src.benchmarks.common import (
    COUNT,
    Target,
    Timings,
    add_common_options,
    describe_machine,
    machine_line,
    model_config,
    report,
    run_rounds,
)
from src.benchmarks.memory_use import anonymous_bytes
from src.benchmarks.moe import MoeContenders, OffloadReport, moe_targets, print_reports, share_parts
from src.benchmarks.routing import TRACE, find_trace
from src.benchmarks.workload import (
    PROMPT_TOKENS,
    TextIds,
    decode_step,
    load_text_ids,
    scratch_directory,
    write_runs,
)
from src.cli import add_reader_option, input_file, parser, run_verb
from src.inference import InferenceModel, load_model
from src.inference.disk_experts import DiskExperts
from src.inference.generation import PREFILL_CHUNK_TOKENS, prefill
from src.lut import read_manifest
from src.model import KeyValueCache
from src.model.products import PackedWeight, linear
from src.system.console import progress_bar
from src.system.hardware import synchronize

CACHED_ROWS = 1024
MATMULS, PLAIN = "plain matmuls alone", "dense, plain weights"
COMPUTED, IN_MEMORY, WARM, COLD = "experts computed", "table in RAM", "disk, warm", "disk, cold"
OVER_MATMULS = {1: 1.25, 8: 1.7, 32: 2.2}
"""What a step of Dense may take over its matrix products with plain weights, by batch size."""
CACHED = f"disk + {CACHED_ROWS} rows"
TABLES = (IN_MEMORY, WARM, COLD, CACHED)
EVERY = (PLAIN, COMPUTED, *TABLES)
"""All but Dense itself."""


class Contenders:
    """Models of one backbone that differ in where expert rows come from; one of them is called `dense`."""

    def __init__(self, lut_dir: Path, models: Mapping[str, InferenceModel]) -> None:
        """Take models that are on one device; `lut_dir` is the table that those on disk read."""
        self.lut_dir, self.models, self.device = lut_dir, models, models["dense"].embedding.weight.device
        for name, model in models.items():
            if name != PLAIN:
                share_parts(model, models["dense"])

    @property
    def hit_rate(self) -> float:
        cached = self.models[CACHED].experts
        assert isinstance(cached, DiskExperts)
        return cached.store.stats.hit_rate

    def set_page_cache(self, name: str, token_ids: Tensor) -> None:
        """Drop the table's pages, or make those of `token_ids` resident; off the clock."""
        model = self.models[name]
        if name in (COLD, CACHED):
            workload.drop(self.lut_dir)
        elif name == WARM:
            assert isinstance(model.experts, DiskExperts)
            model.experts.store.gather(token_ids.unique())


def load_contenders(
    stack: ExitStack, mole: Path, dense: Path, reader: str, names: Collection[str] = EVERY
) -> Contenders:
    """Load Dense and `names` on the CPU, those on disk with `reader`; the caller's stack closes them."""
    row_mb = read_manifest(mole / "lut").layout.row_bytes / 2**20
    models: dict[str, InferenceModel] = {"dense": stack.enter_context(load_model(dense))}
    if PLAIN in names and isinstance(models["dense"].head.weight, PackedWeight):
        models[PLAIN] = copy.deepcopy(models["dense"])
    if COMPUTED in names:
        models[COMPUTED] = stack.enter_context(load_model(mole, experts="ffn"))
    for name in TABLES:
        if name in names:
            how, cache_mb = "memory" if name == IN_MEMORY else reader, CACHED_ROWS * row_mb * (name == CACHED)
            models[name] = stack.enter_context(load_model(mole, experts="lut", reader=how, cache_mb=cache_mb))
    return Contenders(mole / "lut", models)


def filled_cache(contenders: Contenders, batch: int, new_tokens: int = 1) -> KeyValueCache:
    """Return random keys and values of a prompt, with room for `new_tokens` more."""
    config, room = contenders.models["dense"].config, PROMPT_TOKENS + new_tokens
    cache = KeyValueCache(config, batch, room, device=contenders.device, dtype=torch.bfloat16)
    cache.keys.normal_()
    cache.values.normal_()
    cache.length = PROMPT_TOKENS
    return cache


@torch.inference_mode()
def measure_decode(
    contenders: Contenders, text: TextIds, batch: int, rounds: int, moe: MoeContenders | None = None
) -> Timings:
    """Time steps after a prompt, those of `moe` beside them, each right after an untimed step of Dense.

    In decoding, too, a step follows a step. Behind a contender that waited for its disk, cores have fallen idle, and
    the next step takes up to a quarter longer.

    Keys and values are random, and the same for all, but for MoE, whose experts depend on them.
    """
    cache = filled_cache(contenders, batch, rounds + 3)
    steps = [text.distinct(batch) for _ in range(rounds + 2)]

    def timed(name: str, model: InferenceModel) -> Callable[[int], float]:
        def one(number: int) -> float:
            contenders.set_page_cache(name, steps[number])
            cache.length = PROMPT_TOKENS + 1 + number
            return decode_step(model, steps[number], cache)

        return one

    calls = {name: timed(name, model) for name, model in contenders.models.items()}
    calls[MATMULS] = matmuls_alone(contenders.models.get(PLAIN, contenders.models["dense"]), batch)
    for call in calls.values():  # fill buffers, choose kernels
        for number in (rounds, rounds + 1):
            call(number)
    if moe is not None:
        calls |= moe.calls(text, batch, rounds)

    def after_a_step(call: Callable[[int], float]) -> Callable[[int], float]:
        def one(number: int) -> float:
            cache.length = PROMPT_TOKENS + 1 + number
            decode_step(contenders.models["dense"], steps[number - 1], cache)
            return call(number)

        return one

    with progress_bar(f"batch {batch}", rounds) as advance:
        return run_rounds({name: after_a_step(call) for name, call in calls.items()}, rounds, advance)


@torch.inference_mode()
def measure_prefill(contenders: Contenders, text: TextIds, rounds: int) -> Timings:
    """Time a prompt of 512 tokens of running text, for one sequence."""
    prompts = [text.window(PROMPT_TOKENS).unsqueeze(0) for _ in range(rounds + 1)]

    def timed(name: str, model: InferenceModel) -> Callable[[int], float]:
        @torch.inference_mode()
        def one(number: int) -> float:
            contenders.set_page_cache(name, prompts[number])
            cache = KeyValueCache(model.config, 1, PROMPT_TOKENS, device=contenders.device, dtype=torch.bfloat16)
            start = time.perf_counter()
            prefill(model, prompts[number], cache, None, PREFILL_CHUNK_TOKENS)
            return time.perf_counter() - start

        return one

    calls = {name: timed(name, model) for name, model in contenders.models.items()}
    for call in calls.values():
        call(rounds)
    with progress_bar("prefill", rounds) as advance:
        return run_rounds(calls, rounds, advance)


def matmul_weights(dense: InferenceModel) -> list[Tensor]:
    """Return the weights of the model's matrix products: all matrices but the embedding, and the head."""
    blocks = [weight for weight in dense.blocks.parameters() if weight.dim() == 2]
    return [*blocks, dense.head.weight]


def matmuls_alone(dense: InferenceModel, batch: int) -> Callable[[int], float]:
    """Return a call that times the model's products with its weights, and nothing else."""
    weights = matmul_weights(dense)
    device = weights[0].device
    widths = {weight.shape[1] for weight in weights}
    inputs = {width: torch.randn(batch, width, dtype=torch.bfloat16, device=device) for width in widths}

    @torch.inference_mode()
    def call(_: int) -> float:
        start = time.perf_counter()
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)
        synchronize(device)
        return time.perf_counter() - start

    return call


def read_bandwidth() -> float:
    """Return bytes per second that plain reads of memory reach: a sum over 512 MiB, the best of five."""
    values = torch.ones(2**26, dtype=torch.int64)
    return values.nbytes / min(timeit.repeat(values.sum, repeat=5, number=1))


Memory = dict[str, dict[int, int]]
"""Peak anonymous bytes by form and batch."""


def targets(decode: Mapping[int, Timings], prefills: Timings, memory: Memory) -> list[Target]:
    """Compare with what this project promises for 160M-4E on 2 cores."""
    found: list[Target] = []
    for batch, timings in decode.items():
        title, over_dense = f"batch {batch}: ", 1.10 if batch == 8 else 1.08
        limits = [(COLD, IN_MEMORY, 1.03), (COLD, "dense", over_dense), (WARM, IN_MEMORY, 1.02)]
        if batch in OVER_MATMULS:
            limits.append(("dense", MATMULS, OVER_MATMULS[batch]))
        if PLAIN in timings.seconds:
            limits.append(("dense", PLAIN, 1.02))
        found += [timings.target(title, name, reference, limit) for name, reference, limit in limits]
    found.append(prefills.target("prefill: ", COLD, "dense", 1.15))
    if PLAIN in prefills.seconds:
        found.append(prefills.target("prefill: ", "dense", PLAIN, 1.02))
    for batch, limit in ((1, 96), (32, 320)):
        if batch in memory.get("disk", {}):
            above = (memory["disk"][batch] - memory["dense"][batch]) / 2**20
            found.append(Target(f"batch {batch}: anonymous MiB of disk above dense, peak", above, limit))
    return found


def print_timings(title: str, timings: Timings, console: Console, reference: str = "dense") -> None:
    """Print one table: medians, tails, and ratios to the reference within each round."""
    table = Table("contender", "median ms", "p99 ms", f"over {reference} (95 %)", title=title)
    for name in timings.seconds:
        milliseconds = f"{1e3 * timings.median(name):.2f}", f"{1e3 * timings.percentile(name, 99):.2f}"
        table.add_row(name, *milliseconds, timings.describe(name, reference))
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print, and write JSON and a plot."""
    example = "python -m src.benchmarks.decode --shape 160m-4e --batches 1 8 32 --output results/decode.json"
    options = parser("benchmarks.decode", __doc__ or "", example)
    options.add_argument("--batches", type=COUNT, nargs="+", default=[1, 8, 32], help="default: 1 8 32")
    options.add_argument("--rounds", type=COUNT, default=33, help="interleaved rounds (default: 33)")
    options.add_argument("--prefill-rounds", type=COUNT, default=15, help="the same for prompts (default: 15)")
    options.add_argument(
        "--routing",
        type=input_file,
        metavar="FILE.npz",
        help=f"choices of a trained MoE (default: {TRACE.name}, if any)",
    )
    add_reader_option(options)
    add_common_options(options)
    given, console = options.parse_args(arguments), Console()
    config = model_config(given.shape)
    text = load_text_ids(given.corpus, given.tokenizer, config.vocab_size)
    trace = find_trace(given.routing, console)
    with scratch_directory(given.directory) as directory, ExitStack() as stack:
        mole, dense = write_runs(directory, config, given.dtype, text.counts)
        memory: Memory = {
            name: {batch: anonymous_bytes(run, batch, text.held_out) for batch in given.batches}
            for name, run in (("dense", dense), ("disk", mole))
        }
        contenders, before = load_contenders(stack, mole, dense, given.reader), workload.bytes_read()
        moe = MoeContenders(stack, contenders.models["dense"], contenders.models[COLD], directory / "experts", trace)
        decode, reports = dict[int, Timings](), dict[int, Mapping[str, OffloadReport]]()
        for batch in given.batches:
            decode[batch] = measure_decode(contenders, text, batch, given.rounds, moe)
            reports[batch] = moe.reports(batch)
        prefills = measure_prefill(contenders, text, given.prefill_rounds)
        read, machine, load = workload.bytes_read() - before, describe_machine(), os.getloadavg()
        bandwidth, hit_rate = read_bandwidth(), contenders.hit_rate
        weight_bytes = sum(weight.nbytes for weight in matmul_weights(contenders.models["dense"]))
    fraction = weight_bytes / decode[given.batches[0]].median(MATMULS) / bandwidth
    checks = [*targets(decode, prefills, memory), *moe_targets(decode, reports)]
    console.print(f"{machine_line(machine)}\n{given.shape}, table in {given.dtype}")
    console.print(f"disk read {read:,} bytes; row cache hit rate {hit_rate:.3f}")
    console.print(f"matmuls alone read weights at {fraction:.2f} of this memory's {bandwidth / 1e9:.0f} GB/s")
    print_figures(decode, prefills, memory, console)
    print_reports(decode, reports, COLD, console)
    groups = {**{f"batch {batch}": timings for batch, timings in decode.items()}, "prefill": prefills}
    document = {"machine": machine, "load": load, "shape": given.shape, "dtype": given.dtype, "disk_read_bytes": read}
    document |= {"hit_rate": hit_rate, "anonymous_bytes": memory, "matmul_bandwidth_fraction": fraction}
    document |= {"routing": None if trace is None else trace.about, "kept_experts": moe.capacity}
    document["offloaded"] = {batch: {name: asdict(one) for name, one in by.items()} for batch, by in reports.items()}
    report(given.output, document, groups, checks, "milliseconds", 1e3, console)


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
