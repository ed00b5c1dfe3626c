"""`python -m src.benchmarks.lookup`: how fast rows come from disk, cold and warm, against what the device can do.

A table of random rows is written in the real format. Ids come from real text and never repeat within a request. Every
round asks each contender for the same rows: the measured reader and `memmap`, with and without checksums, a bare memory
map, and bare O_DIRECT reads by 16 threads on the same files, which is the device's own limit.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
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
from src.benchmarks.workload import BareReads, RandomRows, TextIds, load_text_ids, scratch_directory
from src.cli import add_reader_option, parser, run_verb
from src.errors import LutFormatError
from src.lut import LutStore, build_lut, read_manifest
from src.lut.layout import ALIGNMENT, TableLayout
from src.lut.readers.memory import MemmapReader
from src.lut.readers.reader import ShardFiles
from src.run_directory import Identity
from src.system.console import Advance, progress_bar
from src.system.huge_pages import huge_bytes

COUNTS = (1, 8, 32, 256, 2048)
CACHED_ROWS = 1024
HIT_RATE_TOKENS = 30_000
OTHERS = ("memmap",)
"""Readers that the measured one is compared with."""
RAW_THREADS = 16
SLOW = ("memmap", "memmap copy")
SLOW_LIMIT = 256
"""Most rows requested from cold memory maps: at 2,048 a round would take 15 seconds."""
REPEATS = {1: 20, 8: 5}
"""Requests per round; a round's figure is their median."""
Cells = dict[tuple[str, int], Timings]


class RawReads:
    """Bare O_DIRECT reads of whole blocks into aligned memory, several at once: the device's own limit."""

    def __init__(self, lut_dir: Path, layout: TableLayout, capacity: int, piece_bytes: int = 2**20) -> None:
        """Open the shards past the page cache, for at most `capacity` rows at a time, each read in pieces."""
        self._files, self._piece_bytes = ShardFiles(lut_dir, layout, flags=os.O_DIRECT), piece_bytes
        self._block_bytes = (layout.row_bytes + 2 * (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
        rows = huge_bytes(capacity * self._block_bytes).fill_(0)  # so that no read waits for a page
        self._rows = rows.view(capacity, self._block_bytes).numpy()
        self._pool = ThreadPoolExecutor(RAW_THREADS)

    def __call__(self, token_ids: Tensor) -> None:
        starts = range(0, self._files.row_bytes, self._piece_bytes)
        pieces = [(*item, start) for item in enumerate(sorted(token_ids.tolist())) for start in starts]
        items = iter(pieces)
        helpers = [self._pool.submit(self._take, items) for _ in range(min(RAW_THREADS, len(pieces)) - 1)]
        self._take(items)
        for helper in helpers:
            helper.result()

    def _take(self, items: Iterator[tuple[int, int, int]]) -> None:
        for position, token_id, start in items:
            shard, offset = self._files.locate(token_id)
            block = offset // ALIGNMENT * ALIGNMENT  # where the row's own blocks begin
            first = (offset + start) // ALIGNMENT * ALIGNMENT
            end = offset + min(self._files.row_bytes, start + self._piece_bytes)
            last = -(-end // ALIGNMENT) * ALIGNMENT
            target = self._rows[position, first - block : last - block]
            os.preadv(self._files.descriptors[shard], [target.data], first)

    def close(self) -> None:
        self._pool.shutdown()
        self._files.close()


def measure(lut_dir: Path, text: TextIds, measured: str, rounds: int) -> tuple[Cells, int]:
    """Time the measured reader and the others in every cell; return the timings and the bytes that the disk read."""
    cells: Cells = {}
    before = workload.bytes_read()
    with ExitStack() as stack:
        contenders: dict[str, Callable[[Tensor], object]] = {}
        release: list[Callable[[], None]] = []
        for reader in dict.fromkeys((measured, *OTHERS)):
            for verify in (False, True):
                store = stack.enter_context(LutStore.open(lut_dir, reader=reader, verify_rows=verify))
                contenders[f"{reader}{' + checksum' if verify else ''}"] = store.gather
                if isinstance(store.reader, MemmapReader):
                    release.append(store.reader.release_pages)
        store = stack.enter_context(LutStore.open(lut_dir, reader="pread"))
        copy, raw = MemmapReader(lut_dir, store.layout), RawReads(lut_dir, store.layout, max(COUNTS))
        stack.callback(copy.close)
        stack.callback(raw.close)
        release.append(copy.release_pages)
        contenders["memmap copy"] = BareReads(copy, store.layout.row_bytes, max(COUNTS))
        contenders["raw O_DIRECT"] = raw
        drop = partial(workload.drop, lut_dir, release)
        with progress_bar("rounds", rounds * len(COUNTS) * 2) as advance:
            for state in ("cold", "warm"):
                for count in COUNTS:
                    cells[state, count] = _cell(text, contenders, drop, store.gather, state, count, rounds, advance)
    return cells, workload.bytes_read() - before


def _cell(
    text: TextIds,
    contenders: dict[str, Callable[[Tensor], object]],
    drop: Callable[[], None],
    fill: Callable[[Tensor], object],
    state: str,
    count: int,
    rounds: int,
    advance: Advance,
) -> Timings:
    repeats = REPEATS.get(count, 1)
    requests = [[text.distinct(count) for _ in range(repeats)] for _ in range(rounds)]

    def timed(contender: Callable[[Tensor], object]) -> Callable[[int], float]:
        def one(number: int) -> float:
            taken: list[float] = []
            for token_ids in requests[number]:
                if state == "cold":
                    drop()
                else:
                    fill(token_ids)  # the page cache, which not every contender reads through
                    contender(token_ids)
                start = time.perf_counter()
                contender(token_ids)
                taken.append(time.perf_counter() - start)
            return statistics.median(taken)

        return one

    chosen = {
        name: timed(contender)
        for name, contender in contenders.items()
        if state == "warm" or count <= SLOW_LIMIT or not name.startswith(SLOW)
    }
    return run_rounds(chosen, rounds, advance)


def measure_hit_rate(lut_dir: Path, text: TextIds) -> float:
    """Return the hit rate of a seeded cache over running text, one id at a time; one row in 16 is compared."""
    with LutStore.open(lut_dir, reader="pread") as plain:
        cache_mb = CACHED_ROWS * plain.layout.row_bytes / 2**20
        with LutStore.open(lut_dir, cache_mb=cache_mb) as cached:
            for index, token_id in enumerate(text.held_out[:HIT_RATE_TOKENS].split(1)):
                codes = cached.request(token_id).codes()
                if index % 16 == 0 and not torch.equal(codes, plain.request(token_id).codes()):
                    raise LutFormatError(f"{lut_dir}: the cache returned another row for id {int(token_id)}; a bug")
            return cached.stats.hit_rate


def targets(cells: Cells, reader: str, hit_rate: float) -> list[Target]:
    """Compare a reader with what this project promises for rows of 72 KiB."""
    cold, cold_one, warm_one = cells["cold", 256], cells["cold", 1], cells["warm", 1]
    over_device, over_copy = cold.ratio("raw O_DIRECT", reader), cold.ratio("memmap copy", reader)
    above_copy = 1e6 * warm_one.difference(reader, "memmap copy")
    found = [
        Target(f"cold, 256 ids: raw O_DIRECT's time over {reader}'s", over_device, 0.95, at_least=True),
        Target(f"cold, 256 ids: memmap copy's time over {reader}'s", over_copy, 10, at_least=True),
        Target(f"cold, 1 id: {reader} over one raw O_DIRECT read", cold_one.ratio(reader, "raw O_DIRECT"), 1.2),
        Target(f"warm, 1 id: {reader} above a memmap copy, us", above_copy, 25),
    ]
    found.append(Target(f"hit rate of {CACHED_ROWS} cached rows on held-out text", hit_rate, 0.78, at_least=True))
    regrets = [
        max(timings.ratio(reader, name) for name in (reader, *OTHERS) if name in timings.seconds)
        for timings in cells.values()
    ]
    found.append(Target(f"{reader} over the best reader, geometric mean", statistics.geometric_mean(regrets), 1.1))
    found.append(Target(f"{reader} over the best reader, worst cell", max(regrets), 1.25))
    costs = [
        1e6 * timings.difference(f"{reader} + checksum", reader) / count
        for (state, count), timings in cells.items()
        if state == "warm"
    ]
    found.append(Target("checksum, us a row, worst warm cell", max(costs), 15))
    return found


def print_cells(cells: Cells, row_bytes: int, console: Console) -> None:
    """Print a table per cell."""
    table = Table("page cache", "ids", "contender", "us/row", "p50 us", "p99 us", "rows/s", "GB/s")
    for (state, count), timings in cells.items():
        for name in timings.seconds:
            seconds = timings.median(name)
            table.add_row(
                state,
                str(count),
                name,
                f"{1e6 * seconds / count:.1f}",
                f"{1e6 * seconds:.0f}",
                f"{1e6 * timings.percentile(name, 99):.0f}",
                f"{count / seconds:,.0f}",
                f"{count * row_bytes / seconds / 1e9:.2f}",
            )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print, and write JSON and a plot."""
    example = "python -m src.benchmarks.lookup --shape 160m-4e --rounds 15 --output results/lookup.json"
    options = parser("benchmarks.lookup", __doc__ or "", example)
    options.add_argument("--rounds", type=COUNT, default=15, help="interleaved rounds per cell (default: 15)")
    add_reader_option(options)
    add_common_options(options)
    given = options.parse_args(arguments)
    config = model_config(given.shape)
    text = load_text_ids(given.corpus, given.tokenizer, config.vocab_size)
    with scratch_directory(given.directory) as directory:
        source = RandomRows(config, Identity("benchmark", "benchmark"))
        build_lut(source, directory, dtype=given.dtype, token_counts=text.counts, progress=progress_bar)
        cells, read = measure(directory, text, given.reader, given.rounds)
        hit_rate = measure_hit_rate(directory, text)
        row_bytes = read_manifest(directory).layout.row_bytes
    checks, console = targets(cells, given.reader, hit_rate), Console()
    machine, load = describe_machine(), os.getloadavg()
    console.print(f"{machine_line(machine)}\n{given.shape} {given.dtype}, {row_bytes:,} bytes a row")
    console.print(f"disk read {read:,} bytes; row cache hit rate {hit_rate:.3f}")
    print_cells(cells, row_bytes, console)
    groups = {f"{state} {count}": timings for (state, count), timings in cells.items()}
    document = {"machine": machine, "load": load, "shape": given.shape, "dtype": given.dtype, "disk_read_bytes": read}
    document |= {"row_bytes": row_bytes, "hit_rate": hit_rate}
    report(given.output, document, groups, checks, "microseconds per request", 1e6, console)


if __name__ == "__main__":
    run_verb(main)
