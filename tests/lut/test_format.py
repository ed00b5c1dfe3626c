"""The format on disk, byte by byte, and read with the public library alone."""

import hashlib
import json
import struct
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from src.lut import LutStore, build_lut
from src.lut.layout import plan_shards
from tests.lut.builds import SHARD_BYTES, FixedRows, random_rows

HEADER = (
    '{"__metadata__":{"format":"mole-lut","first_token":"2"},'
    '"rows":{"dtype":"BF16","shape":[1,2,1,2],"data_offsets":[0,8]},'
    '"checksums":{"dtype":"U32","shape":[1],"data_offsets":[8,12]}}'
)


def test_the_bytes_of_a_table_of_three_tokens(tmp_path: Path) -> None:
    rows = torch.tensor([[1.0, 2, 3, 4], [-1, 0.5, 0.25, 0], [100, -100, 1.5, -2]]).view(3, 2, 1, 2)
    build_lut(FixedRows(rows), tmp_path, dtype="bfloat16", shard_bytes=16)
    assert {path.name for path in tmp_path.iterdir()} == {
        "manifest.json",
        "rows-00000.safetensors",
        "rows-00001.safetensors",
    }
    row = struct.pack("<4H", 0x42C8, 0xC2C8, 0x3FC0, 0xC000)  # 100, -100, 1.5, -2
    expected = struct.pack("<Q", 4088) + HEADER.encode().ljust(4088, b" ") + row
    expected += struct.pack("<I", zlib.crc32(struct.pack("<Q", 2) + row))
    assert (tmp_path / "rows-00001.safetensors").read_bytes() == expected
    first = (tmp_path / "rows-00000.safetensors").read_bytes()
    assert first[4096:4112] == struct.pack("<8H", 0x3F80, 0x4000, 0x4040, 0x4080, 0xBF80, 0x3F00, 0x3E80, 0)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["shards"][1] == {
        "file": "rows-00001.safetensors",
        "first_token": 2,
        "num_tokens": 1,
        "file_bytes": 4108,
        "header_sha256": hashlib.sha256(expected[:4096]).hexdigest(),
    }
    assert manifest.pop("sha256") == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    assert (manifest["training_form"], manifest["rows_from"]) == ("t" * 64, "a test")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_safetensors_alone_reads_the_rows_of_a_float_table(dtype: str, tmp_path: Path) -> None:
    rows = random_rows()
    build_lut(FixedRows(rows), tmp_path, dtype=dtype, shard_bytes=SHARD_BYTES)
    with LutStore.open(tmp_path) as store:
        shards = plan_shards(store.layout)
        assert len(shards) > 1
        for shard in shards:
            with safe_open(tmp_path / shard.file_name, framework="pt") as handle:
                public = handle.get_slice("rows")[:]
            ids = torch.arange(shard.first_token, shard.first_token + shard.num_tokens)
            assert torch.equal(public, store.gather(ids))
            assert torch.equal(public, rows[ids].to(public.dtype))


@pytest.mark.parametrize("dtype", ["int8", "nf4", "nf3"])
def test_packed_rows_come_back_as_their_codec_decodes_them(dtype: str, tmp_path: Path) -> None:
    rows = random_rows(hidden_size=128)
    build_lut(FixedRows(rows), tmp_path, dtype=dtype, shard_bytes=SHARD_BYTES)
    with LutStore.open(tmp_path) as store:
        stored = store.gather(torch.arange(23))
        size = tmp_path.joinpath("rows-00000.safetensors").stat().st_size
        count = store.manifest.shards[0].num_tokens
    assert size == 4096 + count * (store.layout.row_bytes + 4)
    relative = ((stored - rows).norm() / rows.norm()).item()
    assert relative < {"int8": 0.01, "nf4": 0.11, "nf3": 0.22}[dtype]


def test_ids_outside_the_vocabulary_and_closed_stores_are_refused(tmp_path: Path) -> None:
    build_lut(FixedRows(random_rows()), tmp_path)
    store = LutStore.open(tmp_path)
    for bad in (-1, 23):
        with pytest.raises(IndexError, match=rf"token id {bad} is outside the table's vocabulary \[0, 23\)"):
            store.gather(torch.tensor([0, bad]))
    store.close()
    with pytest.raises(ValueError, match="the store is closed; open it again"):
        store.gather(torch.tensor([0]))
