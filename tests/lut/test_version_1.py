"""Tables of format version 1, committed when it was settled, stay readable, with exactly these values."""

import json
from pathlib import Path

import pytest
import torch

from src.lut import LutStore, read_manifest
from src.lut.codecs import NF3, NF4
from src.lut.verification import verify_table
from tests.lut.fixtures_v1 import PRECISIONS, fixture_rows
from tests.lut.reference_codecs import encode_int8, encode_normal_float

FIXTURES = Path(__file__).parent / "fixtures" / "v1"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_version_1_table_is_readable(precision: str) -> None:
    lut_dir, rows = FIXTURES / precision, fixture_rows()
    manifest = read_manifest(lut_dir)
    assert json.loads((lut_dir / "manifest.json").read_text())["format_version"] == 1
    assert [shard.num_tokens for shard in manifest.shards] == [3, 2]
    assert (manifest.training_form, manifest.backbone, manifest.tokenizer) == ("t" * 64, "b" * 64, "c" * 64)
    assert verify_table(lut_dir) == []
    with LutStore.open(lut_dir) as store:
        stored = store.gather(torch.arange(5))
    for found, wanted in zip(stored.reshape(-1, 128), rows.reshape(-1, 128), strict=True):
        torch.testing.assert_close(found.float(), torch.tensor(expected(precision, wanted.tolist())), rtol=1e-6, atol=0)
    assert torch.equal(stored[3].float(), torch.zeros(2, 2, 128))


def expected(precision: str, vector: list[float]) -> list[float]:
    """What a stored vector stands for, in plain loops."""
    if precision == "bfloat16":
        return vector  # multiples of 1/8 up to 1 are exact
    if precision == "int8":
        return encode_int8(vector).values
    return encode_normal_float(vector, NF4 if precision == "nf4" else NF3, 128).values
