"""The table that the experts of a Mixture of Lookup Experts became: rows of token ids, read from disk and decoded.

It is the folder `lut/` next to the weights, in format version 1, or 2 where ids without a row are left out.

D hidden, E experts, L layers, U distinct ids, R rows.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions of tables that store numbers as they are."""
NORMAL_FLOATS = {  # what the codes stand for, relative to the scale of the vector, or of 128 of its values
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "nf3": (
        *(-1.0, -0.535022708485538, -0.24693143181157523, 0.0),
        *(0.18333748033548755, 0.3819939543209139, 0.6229857417143424, 1.0),
    ),
}


class LookupTable:
    """What each expert of each layer returns for each token id, in a folder of safetensors files.

    Rows are read when they are asked for, and no file stays open: a table can be shared, copied, pickled and forked.
    """

    def __init__(self, folder: str | os.PathLike[str], in_memory: bool = False) -> None:
        """Open a folder that holds manifest.json, and read all rows if `in_memory`; ValueError where it is damaged."""
        self.folder = Path(folder).absolute()
        self.manifest = manifest = read_manifest(self.folder)
        self.precision: str = manifest["precision"]
        self.vocab_size: int = manifest["vocab_size"]
        self.row_bytes: int = manifest["row_bytes"]
        self.sizes = (manifest["num_layers"], manifest["num_experts"], manifest["hidden_size"])
        self._shard_tokens: int = manifest["shards"][0]["num_tokens"]  # of every shard but the last
        self._starts: list[int] = []
        self._checksums = memoryview(b"".join(map(self._open_shard, manifest["shards"]))).cast("I")
        self._row_ids = read_row_ids(self.folder, manifest)
        self._rows: Tensor | None = None
        if in_memory:
            self._rows = self._stored(list(range(manifest.get("sparse_rows", self.vocab_size))))

    def _open_shard(self, shard: dict[str, Any]) -> bytes:
        """Check a shard's size and header, note where its rows start, and return its checksums."""
        path = self.folder / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["file_bytes"]:
            raise ValueError(f"{path}: missing or not of {shard['file_bytes']:,} bytes; copy the table again")
        with path.open("rb") as file:
            length = file.read(8)
            header = length + file.read(int.from_bytes(length, "little"))
            file.seek(shard["num_tokens"] * self.row_bytes, os.SEEK_CUR)
            checksums = file.read()
        if hashlib.sha256(header).hexdigest() != shard["header_sha256"]:
            raise ValueError(f"{path}: its header is damaged; copy the table again")
        self._starts.append(len(header))
        return checksums

    def read(self, token_ids: list[int]) -> Tensor:
        """Return the stored rows (U, row_bytes) uint8 of ids in ascending order; zeros for an id that has none.

        IndexError for an id outside of the vocabulary, ValueError for a row that does not match its checksum.
        """
        for token_id in (*token_ids[:1], *token_ids[-1:]):
            if not 0 <= token_id < self.vocab_size:
                raise IndexError(f"token id {token_id} is outside of the vocabulary [0, {self.vocab_size})")
        if self._row_ids is None:
            return self._stored(token_ids)
        ids = torch.tensor(token_ids, dtype=torch.int64)
        numbers = torch.searchsorted(self._row_ids, ids).clamp(max=len(self._row_ids) - 1)
        present = self._row_ids[numbers] == ids
        rows = torch.zeros(len(ids), self.row_bytes, dtype=torch.uint8)
        rows[present] = self._stored(numbers[present].tolist())
        return rows

    def _stored(self, token_ids: list[int]) -> Tensor:
        """Return rows by id, or by number where ids are left out; neighbors are read at once."""
        if self._rows is not None:
            return self._rows[torch.tensor(token_ids, dtype=torch.int64)]
        rows = torch.empty(len(token_ids), self.row_bytes, dtype=torch.uint8)
        start = 0
        for end in range(1, len(token_ids) + 1):
            shard, row = divmod(token_ids[start], self._shard_tokens)
            if (
                end < len(token_ids)
                and end - start < self._shard_tokens - row
                and token_ids[end] == token_ids[end - 1] + 1
            ):
                continue
            path, target = self.folder / self.manifest["shards"][shard]["file"], rows[start:end].numpy()
            with path.open("rb") as file:
                file.seek(self._starts[shard] + row * self.row_bytes)
                if file.readinto(target) < target.nbytes:
                    raise ValueError(f"{path}: shorter than when it was opened; copy the table again")
            start = end
        for token_id, row in zip(token_ids, rows.numpy(), strict=True):
            if crc32(row.data, crc32(token_id.to_bytes(8, "little"))) != self._checksums[token_id]:
                name = f"the row of token id {token_id}" if self._row_ids is None else f"row {token_id}"
                raise ValueError(f"{self.folder}: {name} is damaged; copy the table again")
        return rows

    def layer(self, rows: Tensor, layer: int) -> Tensor:
        """Return what the experts of a layer return (U, E, D), of stored rows (U, row_bytes) on any device."""
        num_layers, num_experts, hidden_size = self.sizes
        return decode(rows.view(len(rows), num_layers, num_experts, -1)[:, layer], self.precision, hidden_size)

    def save(self, folder: Path) -> None:
        """Put the files into a folder: as hard links where the file system has them, else as copies."""
        folder.mkdir(parents=True, exist_ok=True)
        if folder.samefile(self.folder):
            return
        for source in self.folder.iterdir():
            target = folder / source.name
            target.unlink(missing_ok=True)
            try:
                target.hardlink_to(source.resolve())
            except OSError:
                shutil.copyfile(source, target)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LookupTable":
        return self  # nothing changes it

    def __reduce__(self) -> tuple[Any, ...]:
        return LookupTable, (self.folder, self._rows is not None)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what manifest.json says of a table; ValueError where there is none that this code can read."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{path}: missing, so there is no table; copy the folder lut/ to where the weights are")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    stated = manifest.pop("sha256", None)
    if hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest() != stated:
        raise ValueError(f"{path}: damaged or edited; copy the table again")
    precisions = [*FLOATS, "int8", *NORMAL_FLOATS]
    if manifest["format_version"] not in (1, 2) or manifest["precision"] not in precisions:
        found = f"format {manifest['format_version']} in {manifest['precision']}"
        raise ValueError(f"{path}: {found}, but this code reads formats 1 and 2 in {', '.join(precisions)}")
    return manifest


def read_row_ids(folder: Path, manifest: dict[str, Any]) -> Tensor | None:
    """Return the ids that have a row (R,), in ascending order; None where all have one."""
    if manifest["format_version"] == 1:
        return None
    path = folder / "row_ids.safetensors"
    data = bytearray(path.read_bytes()) if path.is_file() else bytearray()
    if hashlib.sha256(data).hexdigest() != manifest["row_ids_sha256"]:
        raise ValueError(f"{path}: missing or damaged; copy the table again")
    return torch.frombuffer(data, dtype=torch.int64, offset=8 + int.from_bytes(data[:8], "little"))


def decode(codes: Tensor, precision: str, hidden_size: int) -> Tensor:
    """Return the vectors (..., D) that are stored as bytes (..., vector_bytes)."""
    if precision in FLOATS:
        return codes.view(FLOATS[precision])
    code_bytes = hidden_size * {"int8": 8, "nf4": 4, "nf3": 3}[precision] // 8
    scales = codes[..., code_bytes:].contiguous().view(torch.float16).float()  # (..., N), behind the codes
    if precision == "int8":
        return codes[..., :code_bytes].view(torch.int8).float() * (scales / 127)
    levels = torch.tensor(NORMAL_FLOATS[precision], device=codes.device)
    bits, word_bytes = (4, 1) if precision == "nf4" else (3, 3)  # a word is as many bytes as hold whole codes
    parts = codes[..., :code_bytes].int().unflatten(-1, (-1, word_bytes))
    weights = torch.tensor([256**index for index in reversed(range(word_bytes))], device=codes.device)
    words = (parts * weights).sum(dim=-1, keepdim=True)  # (..., words, 1)
    shifts = torch.arange(8 * word_bytes - bits, -1, -bits, device=codes.device)  # the first code is highest
    values = levels[(words >> shifts) & (len(levels) - 1)].flatten(-2)  # (..., D)
    return (values.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)
