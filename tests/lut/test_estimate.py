"""The dry run: exact where it counts, and without a trace."""

from pathlib import Path

import torch

from src.lut import build_lut, builder
from src.lut.builder import estimate
from tests.lut.builds import SHARD_BYTES, FixedRows, random_rows


def test_an_estimate_gives_the_exact_size_and_touches_nothing(tmp_path: Path) -> None:
    source = FixedRows(random_rows())
    plan = builder.plan(source, tmp_path / "deep" / "lut", dtype="int8", shard_bytes=SHARD_BYTES)
    found = estimate(plan)
    assert not list(tmp_path.iterdir())
    build_lut(source, tmp_path / "lut", dtype="int8", shard_bytes=SHARD_BYTES)
    shards = list((tmp_path / "lut").glob("rows-*"))
    assert found.table_bytes == sum(path.stat().st_size for path in shards)
    assert found.num_shards == len(shards)
    assert found.fits
    assert found.seconds > 0


def test_its_time_grows_with_the_table() -> None:
    def seconds(vocab_size: int) -> float:
        rows = torch.randn(1, 3, 3, 32).expand(vocab_size, 3, 3, 32)
        return min(estimate(builder.plan(FixedRows(rows), Path("nowhere"))).seconds for _ in range(5))

    assert seconds(256_000) > 20 * seconds(256)
