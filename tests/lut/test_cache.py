"""The row cache: right rows within its budget, first those of training, then those that are used."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import LutFormatError
from src.lut import LutStore
from src.lut.cache import RowCache
from tests.lut.tables import write_table


def rows_of(ids: np.ndarray) -> np.ndarray:
    """Rows (U, 16) that say which id they belong to."""
    return np.repeat(ids.astype(np.uint8)[:, None], 16, axis=1)


@settings(max_examples=200, deadline=None)
@given(slots=st.integers(1, 12), requests=st.lists(st.lists(st.integers(0, 29), min_size=1, max_size=10), max_size=30))
def test_a_hit_is_always_the_row_of_its_id(slots: int, requests: list[list[int]]) -> None:
    cache = RowCache(slots, 30, 16)
    for request in requests:
        ids = np.array(request, dtype=np.int64)
        rows = np.full((len(ids), 16), 255, dtype=np.uint8)
        missing = cache.copy_hits(ids, rows)
        assert (rows[missing] == 255).all()  # untouched
        rows[missing] = rows_of(ids[missing])
        assert np.array_equal(rows, rows_of(ids))
        cache.insert(ids, rows, missing)


def test_what_was_just_used_stays_and_the_longest_unused_goes() -> None:
    cache = RowCache(3, 10, 16)
    for ids in ([0], [1], [2], [0], [3]):
        wanted = np.array(ids, dtype=np.int64)
        missing = cache.copy_hits(wanted, rows := rows_of(wanted))
        cache.insert(wanted, rows, missing)
    kept = [i for i in range(10) if not len(cache.copy_hits(np.array([i]), np.empty((1, 16), dtype=np.uint8)))]
    assert kept == [0, 2, 3]


def test_frequent_ids_survive_a_longer_silence() -> None:
    counts = np.zeros(10, dtype=np.int64)
    counts[7] = 1000
    cache = RowCache(2, 10, 16, counts)
    for token_id in (7, 1, 2, 3):
        wanted = np.array([token_id], dtype=np.int64)
        cache.insert(wanted, rows_of(wanted), cache.copy_hits(wanted, rows_of(wanted)))
    assert not len(cache.copy_hits(np.array([7]), np.empty((1, 16), dtype=np.uint8)))


def test_the_cache_is_seeded_with_the_ids_that_training_saw_most(tmp_path: Path) -> None:
    counts = torch.zeros(300, dtype=torch.int64)
    counts[[5, 50, 250]] = torch.tensor([10, 30, 20])
    expected = write_table(tmp_path, token_counts=counts)
    row_mb = expected.shape[1] / 2**20
    with LutStore.open(tmp_path, cache_mb=2 * row_mb) as store:
        assert store.stats.rows == 0
        rows = store.gather(torch.tensor([50, 5, 250])).view(torch.uint8).flatten(1)
        assert np.array_equal(rows.numpy(), expected[[50, 5, 250]])
        stats = store.stats
        assert (stats.cache_hits, stats.cache_misses, stats.bytes) == (2, 1, expected.shape[1])
        assert stats.hit_rate == pytest.approx(2 / 3)


def test_damaged_counts_are_refused(tmp_path: Path) -> None:
    write_table(tmp_path, token_counts=torch.ones(300, dtype=torch.int64))
    (tmp_path / "token_counts.safetensors").write_bytes(b"")
    with pytest.raises(LutFormatError, match=r"token_counts\.safetensors"):
        LutStore.open(tmp_path, cache_mb=1).close()


def test_threads_share_a_cache_without_a_wrong_row() -> None:
    cache, wrong = RowCache(8, 30, 16), []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(1000):
            ids = random.integers(0, 30, size=4)
            rows = np.empty((4, 16), dtype=np.uint8)
            missing = cache.copy_hits(ids, rows)
            rows[missing] = rows_of(ids[missing])
            if not np.array_equal(rows, rows_of(ids)):
                wrong.append(ids)
            cache.insert(ids, rows, missing)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
