"""Prepares one source: documents read, deduplicated, split, tokenized, written as shards. Resumes where it stopped.

What a shard holds follows from the inputs alone: neither the number of processes nor an interruption changes a byte.
This process reads and writes; other processes tokenize.
"""

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from src.data.batches import BatchPlanner
from src.data.config import DataConfig, SourceConfig
from src.data.encoder_pool import encode_in_order
from src.data.hub import hub_rows
from src.data.progress import Reading, Report
from src.data.shards import ShardRecord, ShardWriter, finished_shards, tidy
from src.data.tally import require_within_budgets, total
from src.data.tokenizer import separator_id


def prepare_shards(
    directory: Path,
    source: SourceConfig,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    config: DataConfig,
    report: Report,
) -> list[ShardRecord]:
    """Write the shards of `source` that `directory` lacks, and return the records of all.

    Raises:
        DataError: a file cannot be read, or more records than the budgets allow give no document.
    """
    directory.mkdir(parents=True, exist_ok=True)
    finished = finished_shards(directory)
    if not finished or not finished[-1].is_last:
        planner = BatchPlanner(source, files, config, finished, directory)
        _write_shards(planner, directory, tokenizer, processes(config), _SourceProgress(source, files, report))
        finished = finished_shards(directory)
    require_within_budgets(total(record.tally for record in finished), config, source.label, at_end=True)
    tidy(directory)
    return finished


def processes(config: DataConfig) -> int:
    """Return how many processes tokenize."""
    if config.prepare_processes is not None:
        return config.prepare_processes
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_shards(
    planner: BatchPlanner, directory: Path, tokenizer: Tokenizer, workers: int, progress: "_SourceProgress"
) -> None:
    writer: ShardWriter | None = None
    batches = encode_in_order(planner, lambda batch: batch.texts, tokenizer, separator_id(tokenizer), workers)
    for batch, encoded in batches:
        writer = writer or ShardWriter(directory, batch.shard)
        writer.write(encoded, np.asarray(batch.held_out, dtype=bool))
        if batch.closing is not None:
            writer.finish(*batch.closing)
            writer = None
        progress.advance_to(batch.file, batch.offset)


class _SourceProgress:
    """Turns a place in a source into a share of the whole: bytes of its files, or rows of a hub dataset."""

    def __init__(self, source: SourceConfig, files: Sequence[Path], report: Report) -> None:
        self._label, self._report = source.label, report
        sizes = [0] if source.hub is not None else [path.stat().st_size for path in files]
        self._before = list(accumulate(sizes, initial=0))
        self._unit = "bytes" if source.hub is None else "rows"
        self._total = self._before[-1] if source.hub is None else hub_rows(source)

    def advance_to(self, file: int, offset: int) -> None:
        self._report(Reading(self._label, self._before[file] + offset, self._total, self._unit))
