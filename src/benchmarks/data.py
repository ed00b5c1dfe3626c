"""`python -m src.benchmarks.data`: speed and memory of preparing a corpus, against the bare tokenizer.

The corpus is real text repeated with its lines in another order each time. The bare tokenizer encodes samples of it
before and after, on all cores, so that a machine whose speed drifts treats both alike. What the loader costs per
training step is measured on the result.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from src.benchmarks.common import BPE_SIZE, COUNT, describe_machine, machine_line
from src.benchmarks.memory_use import sampled_peak
from src.benchmarks.workload import read_texts
from src.cli import find_config, input_file, output_directory, output_file, parser, run_verb
from src.data.config import DataConfig, TokenizerConfig
from src.data.datamodule import StepWindows
from src.data.files import expand_files
from src.data.packed_corpus import prepare_corpus
from src.data.tokenizer import load_tokenizer, train_bpe
from src.errors import caused_by
from src.system.files import atomic_path, expand_home, write_text

_BATCH_CHARACTERS = 1 << 20
_SAMPLE_INTERVAL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured."""

    text_bytes: int
    tokens: int
    documents: int
    seconds: float
    """Of the whole verb, from its start to its end."""
    megabytes_per_second: float
    raw_megabytes_per_second: list[float]
    """`encode_batch_fast` on all cores, before and after."""
    ratio: float
    """Speed by the clock, over that of the bare tokenizer: of little use if other processes are busy."""
    processor_ratio: float
    """The same of bytes per second of processor time, the verb's start included."""
    peak_resident_megabytes: float
    """Sum over all its processes; pages that two of them share count twice."""
    loader_milliseconds: float
    """To read the windows of one step of 16 x 256 tokens, median."""


def write_corpus(path: Path, files: Sequence[str], size: int) -> None:
    """Write `size` bytes of text as JSON lines: the documents of `files` again and again, their lines shuffled."""
    documents = list(read_texts(files))
    generator, written = random.Random(0), 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
        while written < size:
            for text in documents:
                lines = text.splitlines(keepends=True)
                generator.shuffle(lines)
                text = "".join(lines)
                handle.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode())
                if written >= size:
                    break


def raw_speed(path: Path, tokenizer: Tokenizer, size: int) -> tuple[float, float]:
    """Return MB/s of `encode_batch_fast` on the first `size` bytes of text, by the clock and by processor time."""
    done, seconds, processor_seconds = 0, 0.0, 0.0
    for batch in _batches(read_texts([str(path)])):
        started, processor_started = time.perf_counter(), time.process_time()
        tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        seconds += time.perf_counter() - started
        processor_seconds += time.process_time() - processor_started
        done += sum(len(text.encode()) for text in batch)
        if done >= size:
            break
    return done / seconds / 1e6, done / processor_seconds / 1e6


def prepare(config: Path, overrides: Sequence[str]) -> tuple[float, float, float]:
    """Run the verb in a process of its own; return the seconds, processor seconds and peak resident MB of its tree."""
    command = [sys.executable, "-m", "src.prepare_data", "--config", str(config), *overrides]
    started, processor_started = time.perf_counter(), _children_seconds()
    process = subprocess.Popen(command)
    with sampled_peak(lambda: _resident_bytes(process.pid), _SAMPLE_INTERVAL_SECONDS) as peak:
        if (code := process.wait()) != 0:
            raise subprocess.CalledProcessError(code, command)
        seconds = time.perf_counter() - started
    return seconds, _children_seconds() - processor_started, peak[0] / 1e6


def loader_milliseconds(config: DataConfig) -> float:
    """Return the median time to read the windows of one step."""
    steps = StepWindows(prepare_corpus(config), config, rank=0, world_size=1)
    times: list[float] = []
    for step in range(200):
        started = time.perf_counter()
        _ = steps[step]
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def measure(options: argparse.Namespace) -> Result:
    """Write the corpus, prepare it, and measure."""
    folder = options.directory
    corpus, vocabulary = folder / f"{options.megabytes}mb.jsonl", options.tokenizer or folder / "tokenizer.json"
    if options.tokenizer is not None:
        with caused_by("--tokenizer"):
            load_tokenizer(options.tokenizer)
    expand_files(options.files, "--files")  # names what is not there
    folder.mkdir(parents=True, exist_ok=True)
    if not corpus.is_file():
        write_corpus(corpus, options.files, options.megabytes * 10**6)
    if not vocabulary.is_file():
        texts = islice(read_texts([str(corpus)]), 600)
        write_text(vocabulary, train_bpe(texts, options.vocab_size).to_str())
    tokenizer, sample = load_tokenizer(vocabulary), options.raw_megabytes * 10**6
    raw = [raw_speed(corpus, tokenizer, sample)]
    config = DataConfig(
        files=[str(corpus)],
        tokenizer=TokenizerConfig(path=str(vocabulary)),
        cache_dir=str(folder / f"cache-{os.getpid()}"),
    )
    overrides = [f"data.{key}={getattr(config, key)}" for key in ("files", "cache_dir")]
    overrides += [f"data.tokenizer.path={vocabulary}", "model.vocab_size=65536"]
    seconds, processor_seconds, peak = prepare(options.config, overrides)
    raw.append(raw_speed(corpus, tokenizer, sample))
    prepared = prepare_corpus(config)
    both = prepared.train + prepared.validation
    speed = both.bytes / seconds / 1e6
    return Result(
        text_bytes=both.bytes,
        tokens=both.tokens,
        documents=both.documents,
        seconds=seconds,
        megabytes_per_second=speed,
        raw_megabytes_per_second=[by_clock for by_clock, _ in raw],
        ratio=speed / statistics.mean(by_clock for by_clock, _ in raw),
        processor_ratio=both.bytes / processor_seconds / 1e6 / statistics.mean(by_processor for _, by_processor in raw),
        peak_resident_megabytes=peak,
        loader_milliseconds=loader_milliseconds(config),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, report."""
    options = parser("benchmarks.data", __doc__ or "", "python -m src.benchmarks.data --megabytes 1000")
    options.add_argument("--megabytes", type=COUNT, default=100, help="text to prepare (default: 100)")
    options.add_argument("--raw-megabytes", type=COUNT, default=32, help="text per sample of bare speed (default: 32)")
    options.add_argument(
        "--files", type=expand_home, nargs="*", default=[], help="text to repeat (default: the embedded corpus)"
    )
    options.add_argument("--tokenizer", type=input_file, help="tokenizer.json (default: one trained on the text)")
    options.add_argument("--vocab-size", type=BPE_SIZE, default=16384, help="of the trained tokenizer (default: 16384)")
    options.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"), help="config of the verb")
    options.add_argument(
        "--directory", type=output_directory, default=Path(".cache/benchmark-data"), help="where files go"
    )
    options.add_argument("--json", type=output_file, metavar="PATH", help="also write the figures there")
    given = options.parse_args(arguments)
    find_config(given.config)
    machine, result = describe_machine(), measure(given)
    table = Table("figure", "value", title=machine_line(machine))
    for name, value in asdict(result).items():
        table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else str(value))
    Console().print(table)
    if given.json is not None:
        write_text(given.json, json.dumps({"machine": machine, **asdict(result)}, indent=1) + "\n")


def _children_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _resident_bytes(process_id: int) -> int:
    """Return the sum over a process and its descendants; 0 once it has ended."""
    try:
        members = [(root := psutil.Process(process_id)), *root.children(recursive=True)]
        return sum(member.memory_info().rss for member in members)
    except psutil.NoSuchProcess:
        return 0


if __name__ == "__main__":
    run_verb(main)
