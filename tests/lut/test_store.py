"""A store is shared by threads, survives a fork, and notices damage and misuse."""

import multiprocessing
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray

from src.errors import LutError, LutFormatError
from src.lut import LutStore
from src.lut.codecs import CODECS
from src.lut.readers import READERS
from src.lut.store import decode
from tests.lut.tables import shard_path, write_table

VOCAB, THREADS = 300, 8


@pytest.fixture
def table(tmp_path: Path) -> tuple[Path, NDArray[np.uint8]]:
    return tmp_path, write_table(tmp_path, vocab_size=VOCAB, hidden_size=32, shard_bytes=50_000)


def stored(store: LutStore, ids: torch.Tensor) -> NDArray[np.uint8]:
    return store.request(ids).codes().numpy()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("dtype", CODECS)
def test_every_reader_and_precision_returns_what_was_stored(tmp_path: Path, reader: str, dtype: str) -> None:
    expected = write_table(tmp_path, dtype=dtype)
    ids = torch.tensor([4, 299, 0, 4, 150])
    with LutStore.open(tmp_path, reader=reader) as store:
        whole = store.gather(ids)  # (U, L, E, D)
        assert torch.equal(whole, decode(torch.from_numpy(expected[ids.numpy()]), store.layout))
        assert torch.equal(store.gather(ids[1:2]), whole[1:2])
        request = store.request(ids)
        for layer in (1, 0):
            assert torch.equal(request.layer(layer), whole[:, layer])
        out = torch.zeros(5, store.layout.row_bytes, dtype=torch.uint8)
        assert store.request(ids, out=out).codes().data_ptr() == out.data_ptr()
        assert np.array_equal(out.numpy(), expected[ids.numpy()])


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("token_id", [-1, VOCAB])
def test_ids_outside_the_vocabulary_are_named(table: tuple[Path, object], reader: str, token_id: int) -> None:
    with LutStore.open(table[0], reader=reader) as store:
        with pytest.raises(IndexError, match=rf"token id {token_id} is outside .* \[0, {VOCAB}\)"):
            store.request(torch.tensor([1, token_id]))
        with pytest.raises(ValueError, match="one-dimensional int64"):
            store.request(torch.tensor([[1]]))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("cache_mb", [0, 0.01])
def test_a_flipped_byte_is_noticed(table: tuple[Path, NDArray[np.uint8]], reader: str, cache_mb: float) -> None:
    lut_dir, expected = table
    with LutStore.open(lut_dir) as store:
        path, offset = shard_path(lut_dir, store.layout), 4096 + 3 * expected.shape[1] + 17
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(LutFormatError, match="row of token id 3 is damaged"):
        store = LutStore.open(lut_dir, reader=reader, cache_mb=cache_mb)
        request = store.request(torch.arange(10))
        for _ in range(2):  # the second time from what the first one kept
            with pytest.raises(LutFormatError):
                request.wait()
        request.wait()
    with LutStore.open(lut_dir, reader=reader, verify_rows=False) as store:
        assert stored(store, torch.tensor([3])).tobytes() != expected[3].tobytes()


def check_threads(store: LutStore, expected: NDArray[np.uint8], batches: int) -> list[int]:
    """Let `THREADS` threads share a store; return the seeds of those that saw a wrong row."""
    failed: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(batches):
            ids = torch.randint(VOCAB, (int(torch.randint(1, 9, (1,), generator=generator)),), generator=generator)
            if not np.array_equal(stored(store, ids), expected[ids.numpy()]):
                failed.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


@pytest.mark.parametrize("reader", READERS)
def test_threads_share_a_store_and_leave_nothing_behind(table: tuple[Path, NDArray[np.uint8]], reader: str) -> None:
    process = psutil.Process()
    threads, files, batches = threading.active_count(), process.num_fds(), 1000 if reader == "auto" else 200
    with LutStore.open(table[0], reader=reader, cache_mb=0.01) as store:
        assert check_threads(store, table[1], batches) == []
        assert 0 < store.stats.requests <= THREADS * batches
    assert threading.active_count() <= threads  # an earlier test's may have ended meanwhile
    assert process.num_fds() <= files


def _in_child(store: LutStore, expected: NDArray[np.uint8], queue: "multiprocessing.Queue[list[int]]") -> None:
    torch.set_num_threads(1)
    queue.put(check_threads(store, expected, 100))


@pytest.mark.parametrize("reader", READERS)
def test_a_forked_child_reads_the_same_rows(table: tuple[Path, NDArray[np.uint8]], reader: str) -> None:
    context = multiprocessing.get_context("fork")
    with LutStore.open(table[0], reader=reader, cache_mb=0.01) as store:
        check_threads(store, table[1], 20)  # threads exist, the cache is warm
        pending = store.request(torch.arange(VOCAB))
        queue: multiprocessing.Queue[list[int]] = context.Queue()
        child = context.Process(target=_in_child, args=(store, table[1], queue))
        child.start()
        assert queue.get(timeout=60) == []
        child.join(timeout=60)
        assert child.exitcode == 0
        assert np.array_equal(pending.codes().numpy(), table[1])
        assert check_threads(store, table[1], 20) == []


@pytest.mark.parametrize("reader", READERS)
def test_a_closed_store_refuses(table: tuple[Path, object], reader: str) -> None:
    store = LutStore.open(table[0], reader=reader)
    store.close()
    store.close()
    with pytest.raises(LutError, match="the store is closed; open it again"):
        store.gather(torch.tensor([0]))


def test_a_wrong_name_or_budget_is_refused(table: tuple[Path, object]) -> None:
    with pytest.raises(LutError, match=f"'mmap' is unknown; choose one of {', '.join(READERS)}"):
        LutStore.open(table[0], reader="mmap")
    with pytest.raises(LutError, match="cache_mb -1, but it must not be negative"):
        LutStore.open(table[0], cache_mb=-1)


def test_rows_that_a_caller_keeps_are_not_overwritten(table: tuple[Path, NDArray[np.uint8]]) -> None:
    with LutStore.open(table[0]) as store:
        kept = [(i, store.gather(torch.tensor([i]))[0, 1]) for i in range(20)]
        for token_id, layer_rows in kept:
            assert torch.equal(layer_rows, store.gather(torch.tensor([token_id]))[0, 1])
