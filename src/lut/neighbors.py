"""What a token's rows look like, and which tokens' rows lie nearest: one pass over the table, in bounded memory.

V vocabulary, U tokens of a run, L layers, E experts, D hidden, K neighbors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from src.lut.manifest import read_manifest
from src.lut.table_rows import TableRows

RUN_BYTES = 32 * 2**20
Progress = Callable[[int], None]
"""Called with the number of rows that were just compared."""


@dataclass(frozen=True, kw_only=True)
class Neighborhood:
    """A token's rows among all others, for some layers."""

    layers: tuple[int, ...]
    norms: Tensor
    """(layers, E): length of the token's vector."""
    cosines: Tensor
    """(layers, E, K): cosine to the nearest other tokens, largest first."""
    token_ids: Tensor
    """(layers, E, K) int64: those tokens."""


def find_neighbors(
    lut_dir: Path, token_id: int, *, layers: Sequence[int], neighbors: int, progress: Progress | None = None
) -> Neighborhood:
    """Compare a token's row with every other, layer by layer and expert by expert.

    Raises:
        IndexError: the id lies outside [0, V).
        LutError: the table cannot be opened, or a row is damaged.
    """
    vocab_size, row_bytes = read_manifest(lut_dir).vocab_size, read_manifest(lut_dir).row_bytes
    if not 0 <= token_id < vocab_size:
        raise IndexError(f"token id {token_id} is outside the table's vocabulary [0, {vocab_size})")
    rows = TableRows(lut_dir)
    wanted = torch.stack([rows.layer_rows(layer, token_id, 1)[0] for layer in layers])  # (layers, E, D)
    best = torch.full((*wanted.shape[:2], 0), 0.0)  # (layers, E, up to K)
    best_ids = best.long()
    step = max(1, RUN_BYTES // row_bytes)
    for first in range(0, vocab_size, step):
        count = min(step, vocab_size - first)
        run = (rows.layer_rows(layer, first, count) for layer in layers)
        cosines = torch.stack([_cosines(*pair) for pair in zip(run, wanted, strict=True)])  # (layers, E, U)
        if first <= token_id < first + count:
            cosines[..., token_id - first] = -torch.inf  # not a neighbor of itself
        ids = torch.arange(first, first + count).expand(cosines.shape)
        best, best_ids = _largest(torch.cat([best, cosines], -1), torch.cat([best_ids, ids], -1), neighbors)
        if progress is not None:
            progress(count)
    kept = min(neighbors, vocab_size - 1)
    return Neighborhood(
        layers=tuple(layers), norms=wanted.norm(dim=-1), cosines=best[..., :kept], token_ids=best_ids[..., :kept]
    )


def _cosines(rows: Tensor, wanted: Tensor) -> Tensor:
    """Cosine (E, U) of rows (U, E, D) with the wanted vectors (E, D)."""
    return F.cosine_similarity(rows, wanted, dim=-1).T


def _largest(cosines: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest cosines of (layers, E, candidates), and their ids."""
    order = cosines.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return cosines.gather(-1, order), ids.gather(-1, order)
