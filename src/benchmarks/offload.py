"""MoE whose experts are on disk, each one contiguous, aligned extent that is read when a layer has routed to it.

The file is a table (`src/lut`) whose rows are experts. A layer's missing experts are read by several threads straight
into the memory that they are multiplied from, and computed as they arrive; the sum over experts is in their order, so
the result is that of the model in memory. What stays in memory between layers is a policy's decision.

L layers, E experts of a layer, D hidden, F width of an expert, N rows, K experts of a row.
"""

import os
import random
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from src.errors import LutError, UserError
from src.lut import build_lut, read_manifest
from src.lut.layout import ALIGNMENT, TableLayout
from src.lut.readers.reader import Finish, ShardFiles, WorkerPool
from src.model.experts import HiddenExperts, ffn
from src.run_directory import Identity
from src.system.console import progress_bar
from src.system.huge_pages import huge_bytes

PIECE_BYTES, THREADS = 2**20, 16
"""An extent is read in pieces by several threads, so that also one alone keeps the disk busy."""
FEW_ROWS = 4
"""Up to so many rows of all experts are computed after all reads: on few cores, the readers' threads need them more."""


class StoredExperts:
    """A source of a table whose row l * E + e is expert e of layer l, matrix after matrix."""

    rows_from = "the experts of a model"
    held_row_bytes = 0
    row_ids = None

    def __init__(self, layers: Sequence[HiddenExperts]) -> None:
        self._layers, self._num_experts = layers, len(layers[0].up)
        self.precision = str(layers[0].up.dtype).removeprefix("torch.")
        self.identity = Identity("benchmark", "benchmark")
        self.config = TableLayout(
            vocab_size=len(layers) * self._num_experts,
            num_layers=1,
            num_experts=1,
            hidden_size=sum(weight[0].numel() for weight in layers[0].weights),
            precision=self.precision,
        )

    def layer_rows(self, layer: int, first_token: int, num_tokens: int) -> Tensor:
        """Return the experts `first_token` to `first_token + num_tokens` as (num_tokens, 1, values) float32."""
        places = (divmod(extent, self._num_experts) for extent in range(first_token, first_token + num_tokens))
        experts = ([weight[expert].flatten() for weight in self._layers[index].weights] for index, expert in places)
        return torch.stack([torch.cat(matrices) for matrices in experts]).unsqueeze(1).float()


def write_experts(directory: Path, layers: Sequence[HiddenExperts]) -> None:
    """Write the experts of all layers to a new directory, in their own precision."""
    source = StoredExperts(layers)
    if (size := source.config.row_bytes) % ALIGNMENT:
        raise UserError(f"an expert takes {size:,} bytes, which is no multiple of {ALIGNMENT}; take another shape")
    build_lut(source, directory, dtype=source.precision, progress=progress_bar)


class ExtentReader:
    """Reads whole extents: past the page cache, or through it."""

    def __init__(self, directory: Path, *, direct: bool) -> None:
        """Open the file; `direct` where the system has O_DIRECT."""
        self.layout = read_manifest(directory).layout
        self._files = ShardFiles(directory, self.layout, getattr(os, "O_DIRECT", 0) if direct else 0)
        self._pool = WorkerPool(THREADS)

    def start(self, targets: Mapping[int, memoryview], arrived: Callable[[int], None]) -> Finish:
        """Start to fill the target of each extent; `arrived` is called on the thread that completed one.

        An extent that cannot be read arrives, too, and what is returned raises its error.
        """
        size, lock, errors = self.layout.row_bytes, threading.Lock(), list[LutError]()
        pieces = [(extent, skip) for extent in targets for skip in range(0, size, PIECE_BYTES)]
        left = Counter(extent for extent, _ in pieces)

        def perform(piece: tuple[int, int]) -> None:
            extent, skip = piece
            try:
                self._fill(extent, targets[extent], skip, min(size, skip + PIECE_BYTES))
            except LutError as error:
                errors.append(error)
            with lock:
                left[extent] -= 1
                complete = not left[extent]
            if complete:
                arrived(extent)

        finish = self._pool.start(perform, pieces)

        def finish_or_raise() -> None:
            finish()
            if errors:
                raise errors[0]

        return finish_or_raise

    def _fill(self, extent: int, target: memoryview, start: int, end: int) -> None:
        while start < end:
            count = self._files.read(extent, target[start:end], start)
            if not count:
                raise self._files.truncated(extent)
            start += count

    def close(self) -> None:
        self._pool.close()
        self._files.close()


class Policy(Protocol):
    """Decides which experts stay in memory when a layer is done."""

    def most_kept(self, num_layers: int) -> int:
        """Return the most experts that ever stay between two layers."""
        ...

    def leaving(self, layer: int, used: Sequence[int]) -> Sequence[tuple[int, int]]:
        """Return the (layer, expert) that leave after `layer` used its experts `used`, in ascending order."""
        ...


class KeepFew:
    """The paper's: a few experts of each layer stay, of those that the step used, at random where they are more.

    With one sequence and as many experts per token these are the experts of the step before. arXiv:2503.15798 counts
    its loads so.
    """

    def __init__(self, per_layer: int = 2, seed: int = 0) -> None:
        self._per_layer, self._random = per_layer, random.Random(seed)
        self._kept: dict[int, set[int]] = {}

    def most_kept(self, num_layers: int) -> int:
        return num_layers * self._per_layer

    def leaving(self, layer: int, used: Sequence[int]) -> Sequence[tuple[int, int]]:
        before = self._kept.get(layer, set())
        self._kept[layer] = set(self._random.sample(used, min(self._per_layer, len(used))))
        return [(layer, expert) for expert in sorted((before | set(used)) - self._kept[layer])]


class KeepRecent:
    """The experts used last stay, over all layers, as many as fit a budget."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._recent: OrderedDict[tuple[int, int], None] = OrderedDict()

    def most_kept(self, num_layers: int) -> int:
        return self._capacity

    def leaving(self, layer: int, used: Sequence[int]) -> Sequence[tuple[int, int]]:
        for expert in used:
            self._recent[layer, expert] = None
            self._recent.move_to_end((layer, expert))
        excess = max(0, len(self._recent) - self._capacity)
        return [self._recent.popitem(last=False)[0] for _ in range(excess)]


def uniform_loads(num_experts: int, batch: int, top_k: int = 2) -> float:
    """Return the loads of a layer and step that the paper counts: every token routed evenly, `top_k` experts kept."""
    missed = 1 - top_k / num_experts
    return num_experts * (1 - missed**batch) * missed


@dataclass(frozen=True)
class Load:
    """Extents that a layer read together."""

    extents: Sequence[int]
    seconds: float
    """From the request to the last arrival."""


class OffloadedExperts:
    """The experts of all layers of one model: those in memory, and a file for the others."""

    def __init__(self, reader: ExtentReader, layers: Sequence[HiddenExperts], policy: Policy) -> None:
        """Take the shapes of `layers`; their values are in the reader's file."""
        self._reader, self._policy, self._num_experts = reader, policy, len(layers[0].up)
        size, dtype = reader.layout.row_bytes, layers[0].up.dtype
        slots = policy.most_kept(len(layers)) + self._num_experts  # a layer at work may use all of its experts
        rows = huge_bytes(slots * size).fill_(0).view(slots, size).numpy()  # no read waits for a page
        self.memory_bytes = rows.nbytes
        shapes = [weight.shape[1:] for weight in layers[0].weights]
        self._targets = [row.data for row in rows]
        self._weights = [_matrices(torch.from_numpy(row).view(dtype), shapes) for row in rows]
        self._free, self._slots = list(range(slots)), dict[int, int]()
        self.loads: list[Load] = []
        """What was read, until a caller clears it."""

    def run_groups(self, layer: int, grouped: Tensor, counts: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Do what `run_groups_in_turn` does, with the experts of `layer` that are here or on disk."""
        sizes: list[int] = counts.tolist()
        tokens, used = grouped.split(sizes), [expert for expert, size in enumerate(sizes) if size]
        first = layer * self._num_experts
        missing = [first + expert for expert in used if first + expert not in self._slots]
        if not missing:
            outputs = {expert: ffn(tokens[expert], *self._weights[self._slots[first + expert]]) for expert in used}
        else:
            outputs = self._run_and_read(first, tokens, used, missing, wait=len(grouped) <= FEW_ROWS)
        for gone_layer, expert in self._policy.leaving(layer, used):
            self._free.append(self._slots.pop(gone_layer * self._num_experts + expert))
        return torch.cat([outputs[expert] for expert in used])

    def _run_and_read(
        self, first: int, tokens: Sequence[Tensor], used: Sequence[int], missing: Sequence[int], *, wait: bool
    ) -> dict[int, Tensor]:
        """Read the extents `missing`, and run the experts `used` of a layer: as they arrive, or with `wait` then."""
        arrivals: SimpleQueue[tuple[int, float]] = SimpleQueue()
        here = [expert for expert in used if first + expert in self._slots]
        self._slots |= {extent: self._free.pop() for extent in missing}
        started, arrived = time.perf_counter(), 0.0
        finish = self._reader.start(
            {extent: self._targets[self._slots[extent]] for extent in missing},
            lambda extent: arrivals.put((extent, time.perf_counter())),
        )
        if wait:
            finish()
        outputs = {expert: ffn(tokens[expert], *self._weights[self._slots[first + expert]]) for expert in here}
        for _ in missing:
            extent, arrived = arrivals.get()
            outputs[extent - first] = ffn(tokens[extent - first], *self._weights[self._slots[extent]])
        finish()
        self.loads.append(Load(missing, arrived - started))
        return outputs

    def load_everything(self) -> None:
        """Read all experts, for a policy that keeps them."""
        extents = [extent for extent in range(self._reader.layout.vocab_size) if extent not in self._slots]
        self._slots |= {extent: self._free.pop() for extent in extents}
        self._reader.start({extent: self._targets[self._slots[extent]] for extent in extents}, lambda _extent: None)()
        for layer in range(self._reader.layout.vocab_size // self._num_experts):
            assert not self._policy.leaving(layer, range(self._num_experts))


def _matrices(values: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = values.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class OffloadedLayer(HiddenExperts):
    """`HiddenExperts` of a layer without their weights."""

    def __init__(self, experts: HiddenExperts, offloaded: OffloadedExperts, layer: int) -> None:
        with torch.device("meta"):
            num_experts, hidden_size, width = experts.up.shape
            super().__init__(num_experts, hidden_size, width, "gelu" if experts.gate is None else "swiglu")
        self._in_turn = partial(offloaded.run_groups, layer)
