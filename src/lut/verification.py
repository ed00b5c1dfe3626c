"""Proves that a table on disk is what was written: every byte of every file, against what the manifest says.

Reading a row checks that row; this checks them all, and lists every problem instead of the first. `find_neighbors`
looks for the tokens with the most similar rows. Both make one pass over the table, in bounded memory.

V vocabulary, U tokens of a run, L layers, E experts, D hidden, K neighbors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from src.errors import LutError
from src.lut.layout import Shard, TableLayout
from src.lut.manifest import OLD_ERRORS_NAME, Manifest, read_manifest
from src.lut.scan import TableScan, check_shard, read_row_ids, read_token_counts, row_numbers
from src.lut.sources import TableRows
from src.system.console import Advance, no_advance

_VERIFIED_BYTES, _COMPARED_BYTES = 4 * 2**20, 32 * 2**20
"""Rows in memory at a time."""


def verify_table(lut_dir: Path, progress: Advance = no_advance) -> list[str]:
    """Read a whole table and return its problems, each naming the file and, for a row, the token id; [] when sound.

    A table whose manifest cannot be trusted has that one problem, since nothing can be checked against it.
    """
    try:
        manifest = read_manifest(lut_dir)
    except LutError as error:
        return [str(error)]
    problems = list(_companion_problems(lut_dir, manifest))
    for shard in manifest.shards:
        problems += _shard_problems(lut_dir, manifest.layout, shard, progress)
    return problems


def _companion_problems(lut_dir: Path, manifest: Manifest) -> Iterator[str]:
    for read in (read_token_counts, read_row_ids):
        try:
            read(lut_dir, manifest)
        except LutError as error:
            yield str(error)
    for path in sorted(lut_dir.iterdir()):
        if path.name not in (*manifest.file_names, OLD_ERRORS_NAME):
            yield f"{path}: is not part of this table; remove it, or find out what wrote it"


def _shard_problems(lut_dir: Path, layout: TableLayout, shard: Shard, progress: Advance) -> Iterator[str]:
    try:
        check_shard(lut_dir, shard, layout)
    except LutError as error:
        yield str(error)
        progress(shard.num_tokens)
        return
    scan, step = TableScan(lut_dir, layout), max(1, _VERIFIED_BYTES // layout.row_bytes)
    for row in range(0, shard.num_tokens, step):
        count = min(step, shard.num_tokens - row)
        damaged = scan.damaged(shard.first_token + row, count)
        yield from (f"{lut_dir / shard.file_name}: {problem}" for problem in damaged)
        progress(count)


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
    lut_dir: Path, token_id: int, *, layers: Sequence[int], neighbors: int, progress: Advance = no_advance
) -> Neighborhood:
    """Compare a token's row with every other, layer by layer and expert by expert.

    Raises:
        IndexError: the id is outside [0, V).
        LutError: the table cannot be opened, the id has no row in it, or a row is damaged.
    """
    rows = TableRows(lut_dir)
    vocab_size, step = rows.config.vocab_size, max(1, _COMPARED_BYTES // rows.config.row_bytes)
    if not 0 <= token_id < vocab_size:
        raise IndexError(f"token id {token_id} is outside the table's vocabulary [0, {vocab_size})")
    num_rows, number = rows.config.num_rows, token_id
    if rows.row_ids is not None and (number := row_numbers(rows.row_ids.numpy(), [token_id])[0]) == num_rows:
        raise LutError(f"{lut_dir}: token id {token_id} has no row in this table; name one that training saw")
    wanted = torch.stack([rows.layer_rows(layer, number, 1)[0] for layer in layers])  # (layers, E, D)
    best = torch.full((*wanted.shape[:2], 0), 0.0)  # (layers, E, up to K)
    best_ids = best.long()
    for first in range(0, num_rows, step):
        count = min(step, num_rows - first)
        pairs = zip((rows.layer_rows(layer, first, count) for layer in layers), wanted, strict=True)
        cosines = torch.stack([F.cosine_similarity(*pair, dim=-1).T for pair in pairs])  # (layers, E, U)
        if first <= number < first + count:
            cosines[..., number - first] = -torch.inf  # not a neighbor of itself
        numbers = torch.arange(first, first + count)
        ids = (numbers if rows.row_ids is None else rows.row_ids[numbers]).expand(cosines.shape)
        best, best_ids = torch.cat([best, cosines], -1), torch.cat([best_ids, ids], -1)
        order = best.argsort(dim=-1, descending=True, stable=True)[..., :neighbors]
        best, best_ids = best.gather(-1, order), best_ids.gather(-1, order)
        progress(count)
    kept = min(neighbors, num_rows - 1)
    return Neighborhood(
        layers=tuple(layers), norms=wanted.norm(dim=-1), cosines=best[..., :kept], token_ids=best_ids[..., :kept]
    )
