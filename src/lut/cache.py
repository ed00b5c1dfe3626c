"""Rows of a table kept in memory, within a budget: first the ids that training saw most, then those that are used.

Bookkeeping is arrays over slots and ids, so a lookup costs no Python object per row. U token ids, V vocabulary.
"""

import threading

import numpy as np
from numpy.typing import NDArray

from src.lut.readers.reader import Bytes, reset_after_fork

Ids = NDArray[np.int64]
Positions = NDArray[np.intp]
WINDOW = 64
"""Slots searched for one to evict: the least useful of a moving window is nearly the least useful of all."""


class RowCache:
    """At most `num_slots` rows; safe to share between threads, empty again in a forked child.

    A row's rank is when it was last requested, counted in rows, plus `num_slots` times the logarithm of how often
    training saw its id: frequent ids stay longer. On prose this beats both a fixed set and pure recency.
    """

    def __init__(
        self, num_slots: int, vocab_size: int, row_bytes: int, token_counts: NDArray[np.int64] | None = None
    ) -> None:
        """Reserve the slots, which cost memory when first filled; `token_counts` is (V,).

        In a sparse table ids are the numbers of its rows.
        """
        self.num_slots = min(num_slots, vocab_size)
        counts = np.zeros(vocab_size, dtype=np.int64) if token_counts is None else token_counts
        self._bonus = (self.num_slots * np.log1p(counts)).astype(np.int64)  # (V,)
        self._rows: Bytes = np.empty((self.num_slots, row_bytes), dtype=np.uint8)
        self._slot_of = np.empty(vocab_size, dtype=np.int32)  # -1: not here
        self._id_in: Ids = np.empty(self.num_slots, dtype=np.int64)  # -1: nothing
        self._rank: Ids = np.empty(self.num_slots, dtype=np.int64)
        self.reset_after_fork()
        reset_after_fork(self)

    def reset_after_fork(self) -> None:
        """Empty the cache: in the parent a thread may have been in the middle of a change."""
        self._lock, self._clock, self._hand = threading.Lock(), 0, 0
        self._slot_of.fill(-1)
        self._id_in.fill(-1)
        self._rank.fill(-1)

    def copy_hits(self, token_ids: Ids, rows: Bytes) -> Positions:
        """Copy the rows that are here into `rows` (U, row_bytes); return the positions (M,) of those that are not."""
        with self._lock:
            slots = self._slot_of[token_ids]  # (U,)
            hits = (slots >= 0).nonzero()[0]
            for position in hits.tolist():
                rows[position] = self._rows[slots[position]]
            self._clock += len(token_ids)
            self._rank[slots[hits]] = self._clock + self._bonus[token_ids[hits]]
        return (slots < 0).nonzero()[0]

    def insert(self, token_ids: Ids, rows: Bytes, positions: Positions) -> None:
        """Keep the rows at `positions` of `rows` (U, row_bytes), those of `token_ids` (U,), and evict others."""
        with self._lock:
            wanted, first = np.unique(token_ids[positions], return_index=True)
            new = self._slot_of[wanted] < 0  # another thread may have added some meanwhile
            wanted, sources = wanted[new][: self.num_slots], positions[first[new]][: self.num_slots]
            slots = self._victims(len(wanted))
            evicted = self._id_in[slots]
            self._slot_of[evicted[evicted >= 0]] = -1
            for slot, source in zip(slots.tolist(), sources.tolist(), strict=True):
                self._rows[slot] = rows[source]
            self._id_in[slots], self._slot_of[wanted] = wanted, slots
            self._rank[slots] = self._clock + self._bonus[wanted]

    def _victims(self, count: int) -> Positions:
        """Choose `count` distinct slots: the least useful ones of the window behind the hand."""
        window = min(self.num_slots, max(WINDOW, 4 * count))
        candidates = (self._hand + np.arange(window)) % self.num_slots
        self._hand = (self._hand + window) % self.num_slots
        if count >= window:
            return candidates
        return candidates[np.argpartition(self._rank[candidates], count)[:count]]
