"""A set of document hashes in a fixed amount of memory. Knows no documents.

64 bits of each hash are kept: among 100 million different documents, the chance that any two are taken for
duplicates is 1 in 3,700.
"""

from array import array

_LOAD = 0.6
_FIRST_SLOTS = 1 << 12
_SLOT_BYTES = 8


class HashSet:
    """Remembers 64-bit hashes, at most as many as fit its memory; growing holds the old and the new table at once."""

    def __init__(self, memory_mb: int) -> None:
        """Hold at most `memory_mb` MB, at the moment of growing too."""
        self.max_slots = max(_FIRST_SLOTS, _power_of_two(memory_mb * 10**6 * 2 // 3 // _SLOT_BYTES))
        self.count = 0
        self._slots = _empty(_FIRST_SLOTS)

    @property
    def is_full(self) -> bool:
        """Whether new hashes are no longer remembered."""
        return len(self._slots) == self.max_slots and self.count >= _LOAD * self.max_slots

    def add(self, value: int) -> bool:
        """Return whether `value`, in [0, 2**64), is new; remember it unless the set is full."""
        value = value or 1  # 0 marks a free slot
        index, is_new = self._find(value)
        if not is_new or self.is_full:
            return is_new
        self._slots[index] = value
        self.count += 1
        if self.count >= _LOAD * len(self._slots) and len(self._slots) < self.max_slots:
            self._grow()
        return True

    def _find(self, value: int) -> tuple[int, bool]:
        slots, mask = self._slots, len(self._slots) - 1
        index = (value * 0x9E3779B97F4A7C15 >> 20) & mask
        while (found := slots[index]) and found != value:
            index = (index + 1) & mask
        return index, not found

    def _grow(self) -> None:
        old, self._slots = self._slots, _empty(2 * len(self._slots))
        for value in old:
            if value:
                self._slots[self._find(value)[0]] = value


def _empty(slots: int) -> "array[int]":
    return array("Q", bytes(_SLOT_BYTES)) * slots


def _power_of_two(number: int) -> int:
    return 1 << (number.bit_length() - 1)
