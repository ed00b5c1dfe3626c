"""Every reader returns the bytes of the files, whatever the kernel does in between."""

import errno
import gc
import os
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.errors import LutError, LutFormatError
from src.lut import LutStore
from src.lut.manifest import read_manifest
from src.lut.readers import READERS, Reader, ResidentTable
from src.lut.readers import pread as pread_module
from src.lut.readers import reader as reader_module
from src.lut.readers.reader import Bytes, WorkerPool
from tests.conftest import open_files_limited
from tests.lut.tables import shard_path, write_table

VOCAB = 300
NAMES = tuple(name for name in READERS if name != "memory")


@pytest.fixture(params=["bfloat16", "int8"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Bytes]:
    """A table of several shards: 1,536-byte rows, and packed ones of 780 bytes that straddle blocks."""
    return tmp_path, write_table(tmp_path, vocab_size=VOCAB, dtype=request.param, shard_bytes=100_000)


@pytest.fixture(params=NAMES)
def reader(request: pytest.FixtureRequest, table: tuple[Path, Bytes]) -> Reader:
    return open_named(request.param, table[0])


def open_named(name: str, lut_dir: Path) -> Reader:
    reader = READERS[name].open(lut_dir, read_manifest(lut_dir).layout, torch.device("cpu"))
    assert not isinstance(reader, ResidentTable)
    return reader


def read(reader: Reader, ids: Sequence[int], row_bytes: int) -> Bytes:
    rows, arrived = np.zeros((len(ids), row_bytes), dtype=np.uint8), list[int]()
    finish = reader.start(
        [(token_id, position) for position, token_id in enumerate(ids)],
        rows,
        lambda token_id, position: arrived.append(position),  # noqa: ARG005
    )
    if finish is not None:
        finish()
    assert sorted(arrived) == list(range(len(ids)))
    return rows


def unchecked(*_: int) -> None:
    pass


def open_files() -> int:
    return psutil.Process().num_fds()


def drop_page_cache(lut_dir: Path) -> None:
    for path in lut_dir.glob("rows-*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def test_rows_are_the_bytes_of_the_files(reader: Reader, table: tuple[Path, Bytes]) -> None:
    lut_dir, expected = table
    for ids in ([0], [VOCAB - 1], list(range(VOCAB)), [5, 4, 3, 4, 299, 5], random.Random(0).sample(range(VOCAB), 77)):
        drop_page_cache(lut_dir)
        for _ in range(2):  # cold, then warm
            assert np.array_equal(read(reader, ids, expected.shape[1]), expected[ids])
    reader.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40), cold=st.booleans())
def test_any_ids_in_any_order(table: tuple[Path, Bytes], ids: list[int], cold: bool) -> None:
    lut_dir, expected = table
    for name in NAMES:
        if cold:
            drop_page_cache(lut_dir)
        reader = open_named(name, lut_dir)
        assert np.array_equal(read(reader, ids, expected.shape[1]), expected[ids])
        reader.close()


def test_short_reads_are_continued(
    table: tuple[Path, Bytes], monkeypatch: pytest.MonkeyPatch, reads: list[int]
) -> None:
    lut_dir, expected = table
    reader = open_named("pread", lut_dir)
    whole = os.preadv

    def short(descriptor: int, targets: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        first = memoryview(targets[0])
        reads.append(len(first))
        if len(first) > 512:
            first = first[:512]
        return whole(descriptor, [first], offset, flags)

    monkeypatch.setattr(os, "preadv", short)
    assert np.array_equal(read(reader, [1, 250, 40], expected.shape[1]), expected[[1, 250, 40]])
    assert len(reads) > 6


@pytest.mark.parametrize("count", [1, 20])
def test_a_failing_disk_is_named(count: int, table: tuple[Path, Bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    lut_dir, expected = table
    reader = open_named("pread", lut_dir)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(LutError, match=r"rows-\d.*: reading from byte [\d,]+ failed \(Input/output error\); check"):
        read(reader, list(range(count)), expected.shape[1])


@pytest.fixture
def reads() -> list[int]:
    return []


@pytest.mark.parametrize("name", ["memmap", "pread"])
def test_a_file_truncated_after_opening_is_named(name: str, table: tuple[Path, Bytes]) -> None:
    lut_dir, expected = table
    reader, path = open_named(name, lut_dir), shard_path(lut_dir, read_manifest(lut_dir).layout)
    os.truncate(path, 5000)
    with pytest.raises(LutFormatError, match=rf"{path.name}: 5,000 bytes long while .* truncated"):
        read(reader, [20, 21], expected.shape[1])


def test_use_after_close_is_an_error(reader: Reader, table: tuple[Path, Bytes]) -> None:
    reader.close()
    reader.close()
    with pytest.raises(LutError, match="closed; open it again"):
        read(reader, [0], table[1].shape[1])


def test_reads_that_outlive_their_reader_fail_or_are_whole(table: tuple[Path, Bytes]) -> None:
    lut_dir, expected = table
    drop_page_cache(lut_dir)
    reader, rows = open_named("pread", lut_dir), np.zeros((VOCAB, expected.shape[1]), dtype=np.uint8)
    finish = reader.start([(i, i) for i in range(VOCAB)], rows, unchecked)
    reader.close()
    try:
        if finish is not None:
            finish()
    except LutError as error:
        assert "closed" in str(error)
    else:
        assert np.array_equal(rows, expected)


def test_a_read_only_folder_is_enough(table: tuple[Path, Bytes]) -> None:
    lut_dir, expected = table
    for path in lut_dir.iterdir():
        path.chmod(0o444)
    lut_dir.chmod(0o555)
    try:
        for name in NAMES:
            assert np.array_equal(read(open_named(name, lut_dir), [2, 1], expected.shape[1]), expected[[2, 1]])
    finally:
        lut_dir.chmod(0o755)


def test_systems_without_linux_calls_read_too(table: tuple[Path, Bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    lut_dir, expected = table
    for name in ("posix_fadvise", "RWF_NOWAIT"):
        monkeypatch.delattr(os, name, raising=False)
    for name in ("auto", "pread"):
        reader = open_named(name, lut_dir)
        assert np.array_equal(read(reader, [3, 299, 0], expected.shape[1]), expected[[3, 299, 0]])
        assert np.array_equal(read(reader, [7], expected.shape[1]), expected[[7]])
        reader.close()


def test_a_window_of_reads_is_started_ahead(table: tuple[Path, Bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    lut_dir, expected = table
    monkeypatch.setattr(pread_module, "IN_FLIGHT_BYTES", 1)
    monkeypatch.setattr(pread_module, "MANY_ROWS", 1000)
    reader, ids = open_named("pread", lut_dir), random.Random(1).sample(range(VOCAB), 100)
    drop_page_cache(lut_dir)
    assert np.array_equal(read(reader, ids, expected.shape[1]), expected[ids])


def test_threads_end_with_the_reader(table: tuple[Path, Bytes]) -> None:
    before, files = threading.active_count(), open_files()
    for name in NAMES:
        reader = open_named(name, table[0])
        read(reader, list(range(VOCAB)), table[1].shape[1])
        reader.close()
    assert threading.active_count() == before
    assert open_files() == files


def test_workers_pass_errors_on_and_stop() -> None:
    pool = WorkerPool(4)

    def fail(item: int) -> None:
        raise LutFormatError(f"item {item}")

    with pytest.raises(LutFormatError, match="item"):
        pool.start(fail, range(20))()
    pool.close()
    with pytest.raises(LutError, match="closed"):
        pool.start(fail, range(20))


def test_a_forked_child_resets_the_stores_that_live_and_no_others(
    table: tuple[Path, Bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: list[object] = []

    def record(**hooks: object) -> None:
        registered.append(hooks)

    monkeypatch.setattr(os, "register_at_fork", record)
    for _ in range(3):
        with LutStore.open(table[0], cache_mb=1):
            pass
    assert registered == []
    gc.collect()
    alive = len(reader_module.owners)
    with LutStore.open(table[0], cache_mb=1):
        assert len(reader_module.owners) == alive + 3  # its gate, threads and cache
    gc.collect()
    assert len(reader_module.owners) == alive


@pytest.mark.parametrize("name", READERS)
def test_more_shards_than_open_files_are_one_clear_error(name: str, tmp_path: Path) -> None:
    write_table(tmp_path, shard_bytes=10_000)
    process = psutil.Process()
    gc.collect()  # or what earlier tests left would be closed below
    before = process.num_fds()
    with (
        open_files_limited(20),
        pytest.raises(LutError, match=r"the table has 50 shards, .*raise the limit \(`ulimit -n"),
    ):
        LutStore.open(tmp_path, reader=name)
    gc.collect()
    assert process.num_fds() == before
    LutStore.open(tmp_path, reader=name).close()
