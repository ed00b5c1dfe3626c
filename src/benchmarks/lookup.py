"""`python -m src.benchmarks.lookup`: how fast rows come from disk, cold and warm, against what the device can do.

A table of random rows is written in the real format. Ids come from real text and never repeat within a request. Every
round asks each contender for the same rows: all readers with and without checksums, a numpy memory map, and bare
O_DIRECT reads by as many threads on the same files, which is the device's own limit.
"""

import json
import mmap
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from src.benchmarks import page_cache
from src.benchmarks.machine import describe_machine, machine_line
from src.benchmarks.plots import bars
from src.benchmarks.random_run import scratch_directory, write_table
from src.benchmarks.rounds import Target, Timings, run_rounds
from src.benchmarks.shapes import SHAPES, model_config
from src.benchmarks.text_ids import TextIds, load_text_ids
from src.cli import parser, progress_bar, run_verb
from src.errors import LutFormatError
from src.files import write_text
from src.lut import LutStore
from src.lut.layout import plan_shards
from src.lut.quantization import CODECS
from src.lut.readers.shard_files import ShardFiles
from src.run_directory import Identity

COUNTS = (1, 8, 32, 256, 2048)
DEPTH = 16
CACHED_ROWS = 1024
HIT_RATE_TOKENS = 30_000
READERS = ("pread", "direct", "auto")
SLOW = ("memmap", "memmap copy")
SLOW_LIMIT = 256
"""Cold memory maps are asked for so many rows at most: at 2,048 a round would take a quarter of a minute."""
REPEATS = {1: 20, 8: 5}
"""Requests per round; a round's figure is their median."""
Cells = dict[tuple[str, int], Timings]


class RawReads:
    """Bare O_DIRECT reads of the rows' blocks into aligned memory: the device's own limit, and the threads'."""

    def __init__(self, lut_dir: Path, store: LutStore, capacity: int) -> None:
        """Open the shards past the page cache."""
        layout = store.layout
        self.files = ShardFiles(lut_dir, layout, plan_shards(layout), flags=os.O_DIRECT)
        self._block_bytes = (layout.row_bytes + 2 * 4095) // 4096 * 4096
        memory = mmap.mmap(-1, capacity * self._block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._rows = np.frombuffer(memory, dtype=np.uint8).reshape(capacity, self._block_bytes)
        self._rows.fill(1)
        self._pool = ThreadPoolExecutor(DEPTH)

    def __call__(self, token_ids: Tensor) -> None:
        """Read the rows, with `DEPTH` threads if there are several."""
        items = iter(list(enumerate(sorted(token_ids.tolist()))))
        helpers = [self._pool.submit(self._take, items) for _ in range(min(DEPTH, len(token_ids)) - 1)]
        self._take(items)
        for helper in helpers:
            helper.result()

    def _take(self, items: "Sequence[tuple[int, int]] | object") -> None:
        for position, token_id in items:  # type: ignore[attr-defined]
            shard, offset = self.files.locate(token_id)
            first = offset // 4096 * 4096
            length = -(-(offset + self.files.row_bytes - first) // 4096) * 4096
            os.preadv(self.files.descriptor(shard), [self._rows[position, :length].data], first)

    def close(self) -> None:
        """End threads, close files."""
        self._pool.shutdown()
        self.files.close()


def memmap_copy(store: LutStore) -> Callable[[Tensor], object]:
    """Return what a user without this project would do: index a memory map, row by row."""
    layout = store.layout
    shards = plan_shards(layout)
    maps = [
        np.memmap(
            store.lut_dir / shard.file_name,
            dtype=np.uint8,
            mode="r",
            offset=shard.rows_offset(layout),
            shape=(shard.num_tokens, layout.row_bytes),
        )
        for shard in shards
    ]
    step, rows = shards[0].num_tokens, np.ones((max(COUNTS), layout.row_bytes), dtype=np.uint8)

    def copy(token_ids: Tensor) -> None:
        for position, token_id in enumerate(token_ids.tolist()):
            rows[position] = maps[token_id // step][token_id % step]

    return copy


def measure(lut_dir: Path, text: TextIds, rounds: int) -> tuple[Cells, int]:
    """Time every contender in every cell; return the timings and the bytes that the disk read."""
    cells: Cells = {}
    before = page_cache.bytes_read()
    with ExitStack() as stack:
        contenders: dict[str, Callable[[Tensor], object]] = {}
        for reader in (*READERS, "memmap"):
            for verify in (False, True):
                store = stack.enter_context(LutStore.open(lut_dir, reader=reader, verify_rows=verify))
                contenders[f"{reader}{' + checksum' if verify else ''}"] = store.gather
        store = stack.enter_context(LutStore.open(lut_dir, reader="pread"))
        contenders["memmap copy"] = memmap_copy(store)
        raw = RawReads(lut_dir, store, max(COUNTS))
        stack.callback(raw.close)
        contenders["raw O_DIRECT"] = raw
        with progress_bar("rounds", rounds * len(COUNTS) * 2) as advance:
            for state in ("cold", "warm"):
                for count in COUNTS:
                    cells[state, count] = _cell(lut_dir, text, contenders, state, count, rounds, advance)
    return cells, page_cache.bytes_read() - before


def _cell(
    lut_dir: Path,
    text: TextIds,
    contenders: dict[str, Callable[[Tensor], object]],
    state: str,
    count: int,
    rounds: int,
    advance: Callable[[int], None],
) -> Timings:
    repeats = REPEATS.get(count, 1)
    requests = [[text.distinct(count) for _ in range(repeats)] for _ in range(rounds)]

    def timed(contender: Callable[[Tensor], object]) -> Callable[[int], float]:
        def one(number: int) -> float:
            taken: list[float] = []
            for token_ids in requests[number]:
                page_cache.drop(lut_dir) if state == "cold" else contender(token_ids)
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


def targets(cells: Cells, hit_rate: float) -> list[Target]:
    """Compare with what this project promises for rows of 72 KiB."""
    cold, cold_one, warm_one = cells["cold", 256], cells["cold", 1], cells["warm", 1]
    found = [
        Target(
            "cold, 256 ids: raw O_DIRECT's time over auto's", cold.ratio("raw O_DIRECT", "auto"), 0.95, at_least=True
        ),
        Target("cold, 256 ids: memmap copy's time over auto's", cold.ratio("memmap copy", "auto"), 10, at_least=True),
        Target("cold, 1 id: auto over one raw O_DIRECT read", cold_one.ratio("auto", "raw O_DIRECT"), 1.2),
        Target("warm, 1 id: auto above a memmap copy, us", 1e6 * warm_one.difference("auto", "memmap copy"), 25),
    ]
    found.append(Target(f"hit rate of {CACHED_ROWS} cached rows on held-out text", hit_rate, 0.78, at_least=True))
    regrets = [_regret(timings) for timings in cells.values()]
    found.append(Target("auto over the best reader, geometric mean", statistics.geometric_mean(regrets), 1.1))
    found.append(Target("auto over the best reader, worst cell", max(regrets), 1.25))
    costs = [
        1e6 * timings.difference("auto + checksum", "auto") / count
        for (state, count), timings in cells.items()
        if state == "warm"
    ]
    found.append(Target("checksum, us a row, worst warm cell", max(costs), 15))
    return found


def _regret(timings: Timings) -> float:
    names = [name for name in (*READERS, "memmap") if name in timings.seconds]
    return max(timings.ratio("auto", name) for name in names)


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
    options.add_argument("--shape", choices=SHAPES, default="160m-4e", help="sizes of the table (default: 160m-4e)")
    options.add_argument("--dtype", choices=tuple(CODECS), default="bfloat16", help="precision (default: bfloat16)")
    options.add_argument("--rounds", type=int, default=15, help="interleaved rounds per cell (default: 15)")
    options.add_argument("--corpus", type=Path, nargs="+", default=[], help="text or .gz (default: standard library)")
    options.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: a BPE trained on the corpus)")
    options.add_argument("--directory", type=Path, default=Path("runs"), help="disk to measure (default: runs)")
    options.add_argument("--output", type=Path, help="write FILE.json, and a plot beside it", metavar="FILE.json")
    given = options.parse_args(arguments)
    config = model_config(given.shape)
    text = load_text_ids(given.corpus, given.tokenizer, config.vocab_size)
    machine, console = describe_machine(), Console()
    with scratch_directory(given.directory) as directory:
        write_table(directory / "lut", config, Identity("benchmark", "benchmark"), given.dtype, text.counts)
        cells, read = measure(directory / "lut", text, given.rounds)
        hit_rate = measure_hit_rate(directory / "lut", text)
        with LutStore.open(directory / "lut") as store:
            row_bytes = store.layout.row_bytes
    console.print(
        f"{machine_line(machine)}\n{given.shape} {given.dtype}, {row_bytes:,} bytes a row, disk read {read:,} bytes"
    )
    print_cells(cells, row_bytes, console)
    checks = targets(cells, hit_rate)
    for check in checks:
        console.print(check.line())
    if given.output is not None:
        document = {
            "machine": machine,
            "load": os.getloadavg(),
            "shape": given.shape,
            "dtype": given.dtype,
            "row_bytes": row_bytes,
            "disk_read_bytes": read,
            "rounds": given.rounds,
            "hit_rate": hit_rate,
            "seconds": {f"{state} {count}": timings.seconds for (state, count), timings in cells.items()},
            "targets": [check.to_dict() for check in checks],
        }
        write_text(given.output, json.dumps(document, indent=1) + "\n")
        shown = {f"{state} {count}": timings for (state, count), timings in cells.items()}
        bars(shown, given.output.with_suffix(".png"), "microseconds per request", 1e6)


if __name__ == "__main__":
    run_verb(main)
