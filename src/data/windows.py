"""Windows of token ids as a pure function of (seed, sample number). Knows no text and no files.

N samples, T tokens of a window; a window is T+1 ids, so that each of T predicts the next. An optimizer step has
A micro-batches of B windows, and U distinct ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from src.data.shards import TokenSequence
from src.errors import DataError

_PERIOD = 1 << 16
"""Samples after which the order of sources repeats, so weights are exact to one part in 65,536."""
PADDED_IDS = 256
"""On a GPU the number of distinct ids is a multiple of this."""
Per = Literal["micro_batch", "step"]


class Mixture:
    """Endless training windows of several streams, each shuffled on its own and drawn by its weight.

    Sources take turns as evenly as their weights allow, so that any run of samples holds them in proportion, to
    within one window. A single stream gives what `training_windows` gives.
    """

    def __init__(self, streams: Sequence[tuple[TokenSequence, float]], sequence_length: int, seed: int) -> None:
        """Mix `streams` of ids by their weights, which need not add up to 1."""
        self._streams = [tokens for tokens, _ in streams]
        self._sequence_length, self._seed = sequence_length, seed
        self._slots = _shares([weight for _, weight in streams])  # (streams,)
        self._turns = _turns(self._slots)  # (period,)
        self._earlier = np.empty(_PERIOD, dtype=np.int64)
        for stream, slots in enumerate(self._slots):
            self._earlier[self._turns == stream] = np.arange(slots)

    def stream_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which stream each sample (N,) comes from."""
        return self._turns[samples % _PERIOD]

    def windows(self, samples: NDArray[np.int64]) -> Tensor:
        """Return windows (N, T+1) int64 for sample numbers (N,)."""
        found = np.empty((len(samples), self._sequence_length + 1), dtype=np.int64)  # not torch: its threads are busy
        streams = self.stream_of(samples)
        within = samples // _PERIOD * self._slots[streams] + self._earlier[samples % _PERIOD]  # (N,)
        for stream in np.unique(streams):
            chosen = streams == stream
            windows = training_windows(
                self._streams[stream], self._sequence_length, within[chosen], self._seed, stream=int(stream)
            )
            found[chosen] = windows.numpy()
        return torch.from_numpy(found)


def training_windows(
    tokens: TokenSequence, sequence_length: int, samples: NDArray[np.int64], seed: int, *, stream: int = 0
) -> Tensor:
    """Return windows (N, T+1) int64 for sample numbers (N,) of an endless shuffled stream.

    Sample i is window `permutation_e(i mod n)` of epoch e = i div n, where n is the number of windows; so every
    window is seen once per epoch, and position, order and resumption depend on (seed, stream, i) alone.
    """
    num_windows = (len(tokens) - 1) // sequence_length
    windows = np.empty_like(samples)
    for epoch in np.unique(samples // num_windows):
        of_epoch = samples // num_windows == epoch
        windows[of_epoch] = permute(samples[of_epoch] % num_windows, num_windows, key=(seed, int(epoch), stream))
    return _cut(tokens, sequence_length, windows)


def held_out_windows(tokens: TokenSequence, sequence_length: int, limit: int) -> Tensor:
    """Return at most `limit` windows (N, T+1) int64, evenly spaced over the split: always the same ones."""
    num_windows = (len(tokens) - 1) // sequence_length
    chosen = np.linspace(0, num_windows, num=min(limit, num_windows), endpoint=False).astype(np.int64)
    return _cut(tokens, sequence_length, chosen)


def permute(index: NDArray[np.int64], size: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """Map each of [0, size) to another, one to one: a keyed Feistel network, so no permutation is ever stored."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    round_keys = np.random.default_rng(key).integers(1 << 63, size=4, dtype=np.uint64)
    value = index.astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    while outside.any():  # walk the cycle until back inside [0, size)
        left, right = value[outside] >> np.uint64(half_bits), value[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_scramble(right ^ round_key) & mask)
        value[outside] = (left << np.uint64(half_bits)) | right
        outside = value >= size
    return value.astype(np.int64)


def _scramble(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's finalizer
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _cut(tokens: TokenSequence, sequence_length: int, windows: NDArray[np.int64]) -> Tensor:
    cut = np.empty((len(windows), sequence_length + 1), dtype=np.int64)
    for row, window in enumerate(windows):
        cut[row] = tokens.read(int(window) * sequence_length, sequence_length + 1)  # neighbors share one token
    return torch.from_numpy(cut)


def _shares(weights: Sequence[float]) -> NDArray[np.int64]:
    """Divide the period's samples by weight: whole numbers, the largest remainders rounded up."""
    exact = np.asarray(weights) / sum(weights) * _PERIOD
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: _PERIOD - shares.sum()]] += 1
    if not shares.all():
        raise DataError(
            f"data.sources: weight {min(weights):g} is less than 1/{_PERIOD} of all; raise it or leave the source out"
        )
    return shares


def _turns(shares: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the stream of each sample of the period, every stream's samples evenly spread."""
    times = np.concatenate([(np.arange(share) + 0.5) / share for share in shares])
    streams = np.repeat(np.arange(len(shares)), shares)
    return streams[np.argsort(times, kind="stable")]


@dataclass(frozen=True)
class StepBatch:
    """The windows of a step, and which distinct ids they hold, found where the data is loaded."""

    windows: Tensor
    """(A, B, T+1) int64."""
    ids: tuple[Tensor, ...] = ()
    """(U,) distinct ids of the inputs of each micro-batch, or of all of them together."""
    inverse: Tensor | None = None
    """(A, B, T) int64: which of the `ids` each input is."""

    @property
    def shape(self) -> torch.Size:
        return self.windows.shape

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: Any) -> Tensor:
        return self.windows[index]

    def distinct(self, index: int | None = None) -> tuple[Tensor, Tensor] | None:
        """Return the distinct ids of micro-batch `index`, or of the step, and which of them each input is."""
        if self.inverse is None:
            return None
        return (self.ids[0], self.inverse) if index is None else (self.ids[index], self.inverse[index])

    def map(self, change: Callable[[Tensor], Tensor]) -> "StepBatch":
        inverse = None if self.inverse is None else change(self.inverse)
        return StepBatch(change(self.windows), tuple(map(change, self.ids)), inverse)

    def to(self, device: torch.device, non_blocking: bool = True) -> "StepBatch":
        """Copy everything to a device."""
        return self.map(partial(Tensor.to, device=device, non_blocking=non_blocking))

    def pin_memory(self) -> "StepBatch":
        """Copy everything to page-locked memory."""
        return self.map(Tensor.pin_memory)


def find_distinct(windows: Tensor, per: Per | None, multiple: int = 1) -> StepBatch:
    """Find the distinct input ids of each micro-batch of windows (A, B, T+1), or of the whole step, or none.

    Their number is padded with ids that no position uses to a multiple of `multiple`, which keeps shapes alike.
    """
    if per is None:
        return StepBatch(windows)
    groups = windows[..., :-1].unbind() if per == "micro_batch" else [windows[..., :-1]]
    ids, inverse = zip(*(group.unique(return_inverse=True) for group in groups), strict=True)
    padded = (nn.functional.pad(found, (0, -len(found) % multiple), value=int(found[0])) for found in ids)
    return StepBatch(windows, tuple(padded), torch.stack(inverse) if per == "micro_batch" else inverse[0])
