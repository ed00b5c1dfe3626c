"""The builder: same bytes from any number of ranks and after any interruption, and never a half-written table."""

import errno
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from src.errors import LutError
from src.lut import LutStore, build_lut, builder, read_manifest
from src.lut.sources import ModelRows, RunRows, TableRows
from src.lut.verification import verify_table
from src.run_directory import RunDirectory
from tests.lut.builds import SHARD_BYTES, FixedRows, build_on_ranks, contents, random_rows, small_model

PRECISIONS = ("float32", "bfloat16", "int8", "nf4")


def build(lut_dir: Path, rows: Tensor | None = None, **options: object) -> dict[str, bytes]:
    source = FixedRows(random_rows() if rows is None else rows)
    build_lut(source, lut_dir, dtype="float32", shard_bytes=SHARD_BYTES, chunk_tokens=2, **options)  # pyright: ignore[reportArgumentType]
    return contents(lut_dir)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(dtype: str, world_size: int, tmp_path: Path) -> None:
    model, options = small_model(), {"dtype": dtype, "shard_bytes": 1200, "chunk_tokens": 2}
    build_lut(model, tmp_path / "one", **options, token_counts=torch.arange(23))  # pyright: ignore[reportArgumentType]
    manifests = build_on_ranks(model, tmp_path / "many", world_size, **options, token_counts=torch.arange(23))
    assert manifests == [read_manifest(tmp_path / "one")] * world_size
    assert len(manifests[0].shards) >= 3
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert verify_table(tmp_path / "many") == []


def test_ranks_need_a_barrier(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"world_size is 2, but barrier is missing; pass torch\.distributed\.barrier"):
        build(tmp_path / "lut", rank=1, world_size=2)
    assert not (tmp_path / "lut").exists()


def test_a_rank_that_cannot_prepare_ends_the_build_of_all(tmp_path: Path) -> None:
    before = build(tmp_path / "lut", random_rows() + 1)
    with pytest.raises(LutError, match="holds a finished table"):
        build_on_ranks(FixedRows(random_rows()), tmp_path / "lut", 3, dtype="bfloat16", shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "lut") == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_finished_table_is_not_built_again(overwrite: bool, tmp_path: Path) -> None:
    before, seen = build(tmp_path / "lut"), list[int]()
    options = {"dtype": "float32", "shard_bytes": SHARD_BYTES, "overwrite": overwrite}
    build_on_ranks(FixedRows(random_rows(), seen.append), tmp_path / "lut", 2, **options)
    assert contents(tmp_path / "lut") == before
    assert not seen


def test_a_build_that_was_interrupted_goes_on_where_it_stopped(tmp_path: Path) -> None:
    rows, whole = random_rows(), build(tmp_path / "whole")
    firsts: list[int] = []
    build_lut(FixedRows(rows, firsts.append), tmp_path / "x", dtype="float32", shard_bytes=SHARD_BYTES, chunk_tokens=2)
    for stop in firsts:
        lut_dir, done = tmp_path / f"stopped-{stop}", list[int]()

        def before(first_token: int, stop: int = stop, done: list[int] = done) -> None:
            if first_token == stop and stop not in done:
                done.append(stop)
                raise RuntimeError("pulled the plug")
            done.append(first_token)

        source = FixedRows(rows, before)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            build_lut(source, lut_dir, dtype="float32", shard_bytes=SHARD_BYTES, chunk_tokens=2)
        with pytest.raises(LutError, match=r"manifest.json: missing, so the table is unfinished"):
            LutStore.open(lut_dir)
        build_lut(source, lut_dir, dtype="float32", shard_bytes=SHARD_BYTES, chunk_tokens=2)
        assert contents(lut_dir) == whole
        assert sorted(done) == sorted([*firsts, stop])  # every chunk once, and the one that failed again


@pytest.mark.parametrize(("chunk_tokens", "memory_bytes"), [(3, 2**20), (None, 1), (None, 2**20)])
def test_an_unfinished_build_is_resumed_in_its_own_chunks(
    chunk_tokens: int | None, memory_bytes: int, tmp_path: Path
) -> None:
    whole, done = build(tmp_path / "whole"), list[int]()
    _stop_before(9, tmp_path / "lut")
    source = FixedRows(random_rows(), done.append)
    build_lut(
        source,
        tmp_path / "lut",
        dtype="float32",
        shard_bytes=SHARD_BYTES,
        chunk_tokens=chunk_tokens,
        memory_bytes=memory_bytes,
    )
    assert contents(tmp_path / "lut") == whole
    assert done == [9, 10, 12, 14, 15, 17, 19, 20, 22]


@pytest.mark.parametrize("journal", ["", '{"num_tok', '{"num_tokens": 4}', '{"num_tokens": 99}', '{"num_tokens": []}'])
def test_a_damaged_journal_costs_its_shard_and_nothing_else(journal: str, tmp_path: Path) -> None:
    whole = build(tmp_path / "whole")
    _stop_before(17, tmp_path / "lut")
    assert (tmp_path / "lut" / "rows-00003.progress").is_file()
    (tmp_path / "lut" / "rows-00003.progress").write_text(journal)
    (tmp_path / "lut" / "rows-00001.progress").write_text(journal)
    assert build(tmp_path / "lut") == whole


def test_a_journal_that_counts_more_than_the_file_holds_is_not_believed(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole")
    _stop_before(17, tmp_path / "lut")
    os.truncate(tmp_path / "lut" / "rows-00003.partial", 5000)
    assert build(tmp_path / "lut") == whole


def _stop_before(stop: int, lut_dir: Path) -> None:
    def before(first_token: int) -> None:
        if first_token == stop:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="pulled"):
        build_lut(FixedRows(random_rows(), before), lut_dir, dtype="float32", shard_bytes=SHARD_BYTES, chunk_tokens=2)


def test_a_full_disk_is_one_clear_error_and_the_build_goes_on_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, lut_dir, pwrite, left = build(tmp_path / "whole"), tmp_path / "lut", os.pwrite, [30_000]

    def nearly_full(descriptor: int, data: memoryview, offset: int) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = pwrite(descriptor, data[: left[0]], offset)
        left[0] -= count
        return count

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", nearly_full)
        with pytest.raises(LutError, match=r"partial: could not be written \(No space left on device\); free some"):
            build(lut_dir)
    with pytest.raises(LutError, match="unfinished"):
        LutStore.open(lut_dir)
    assert build(lut_dir) == whole


def test_too_little_space_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", Mock(return_value=usage._replace(free=10_000)))
    with pytest.raises(LutError, match=r"the table needs \d\d,\d{3} more bytes, but 10,000 are free"):
        build(tmp_path / "lut")
    assert not list((tmp_path / "lut").glob("rows-*"))


def test_a_second_builder_is_refused_while_the_first_works(tmp_path: Path) -> None:
    started, go = threading.Event(), threading.Event()

    def before(first_token: int) -> None:
        if first_token == 7:
            started.set()
            assert go.wait(30)

    first = threading.Thread(
        target=build_lut,
        args=(FixedRows(random_rows(), before), tmp_path / "lut"),
        kwargs={"dtype": "float32", "shard_bytes": SHARD_BYTES, "chunk_tokens": 2},
    )
    first.start()
    assert started.wait(30)
    try:
        joined = {"rank": 1, "world_size": 2, "barrier": lambda: None}
        for options in ({}, {"overwrite": True}, {"resume": False}, joined):
            with pytest.raises(LutError, match="another process is building this table"):
                build(tmp_path / "lut", None, **options)
        with pytest.raises(LutError, match="another process is building this table"):
            build_lut(small_model(), tmp_path / "lut", dtype="nf4", overwrite=True)
    finally:
        go.set()
        first.join()
    assert contents(tmp_path / "lut") == build(tmp_path / "alone")


def test_what_another_build_left_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    lut_dir = tmp_path / "lut"
    _stop_before(9, lut_dir)
    with pytest.raises(LutError, match="holds an unfinished table of other weights or another precision"):
        build_lut(FixedRows(random_rows()), lut_dir, dtype="bfloat16", shard_bytes=SHARD_BYTES)
    build_lut(FixedRows(random_rows()), lut_dir, dtype="bfloat16", shard_bytes=SHARD_BYTES, overwrite=True)
    assert verify_table(lut_dir) == []
    with pytest.raises(LutError, match="holds a finished table; choose another --lut name"):
        build(lut_dir)
    assert build(lut_dir, overwrite=True) == build(tmp_path / "fresh")


def test_writers_refuse_a_directory_that_was_prepared_for_another_plan(tmp_path: Path) -> None:
    plan = builder.plan(FixedRows(random_rows()), tmp_path, dtype="float32")
    builder.prepare(plan)
    with pytest.raises(LutError, match="is not prepared for this build"):
        builder.write_shards(replace(plan, chunk_tokens=3))
    with pytest.raises(LutError, match=r"rows-00000.safetensors is not written yet \(1 missing\); resume"):
        builder.publish(plan)


def test_a_run_directory_gives_the_bytes_of_its_model(tmp_path: Path) -> None:
    model, run = small_model(), RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.write_config({"model": model.config.to_dict()})
    run.write_weights(model.state_dict())
    for compute_dtype in ("float32", "bfloat16"):
        build_lut(model, tmp_path / f"model-{compute_dtype}", compute_dtype=compute_dtype, shard_bytes=SHARD_BYTES)
        build_lut(run, tmp_path / f"run-{compute_dtype}", compute_dtype=compute_dtype, shard_bytes=SHARD_BYTES)
        assert contents(tmp_path / f"run-{compute_dtype}") == contents(tmp_path / f"model-{compute_dtype}")
    exact, fast = (ModelRows(model, dtype).layer_rows(1, 3, 9) for dtype in ("float32", "bfloat16"))
    assert 1e-4 < ((fast - exact).norm() / exact.norm()).item() < 2e-2
    _stop_before(9, tmp_path / "lut")
    with pytest.raises(LutError, match="compute_dtype 'float8' is unknown; choose one of float32, bfloat16"):
        RunRows(run, "float8")


def test_settings_that_trade_precision_for_speed_do_not_reach_a_table() -> None:
    model = small_model()
    rows, allowed = ModelRows(model).layer_rows(0, 0, 23), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ModelRows(model).layer_rows(0, 0, 23), rows)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(allowed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "nf4", "nf3"])
def test_a_table_of_another_precision_needs_no_training_form(dtype: str, tmp_path: Path) -> None:
    model, counts = small_model(hidden_size=128), torch.arange(23)
    wide = 3 * 3 * 128 * 4  # one id a shard: matrix products of the same shapes, however the rows are cut
    build_lut(model, tmp_path / "float32", dtype="float32", shard_bytes=wide, tokenizer="a" * 64, token_counts=counts)
    build_lut(model, tmp_path / "direct", dtype=dtype, shard_bytes=SHARD_BYTES, chunk_tokens=1)
    manifest = build_lut(tmp_path / "float32", tmp_path / "converted", dtype=dtype, shard_bytes=SHARD_BYTES)
    direct, converted = contents(tmp_path / "direct"), contents(tmp_path / "converted")
    for shard in manifest.shards:
        assert converted[shard.file_name] == direct[shard.file_name]
    source = read_manifest(tmp_path / "float32")
    assert manifest.rows_from == "table in float32, its rows from experts in float32"
    assert (manifest.training_form, manifest.backbone) == (source.training_form, source.backbone)
    assert (manifest.tokenizer, manifest.token_counts_sha256) == ("a" * 64, source.token_counts_sha256)
    assert verify_table(tmp_path / "converted") == []


def test_a_damaged_table_is_no_source(tmp_path: Path) -> None:
    build(tmp_path / "lut")
    path = tmp_path / "lut" / "rows-00002.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[5000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(LutError, match="the row of token id 10 is damaged"):
        build_lut(TableRows(tmp_path / "lut"), tmp_path / "nf4", dtype="nf4")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "nf4"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_rows_that_are_not_finite_are_refused_by_layer(dtype: str, value: float, tmp_path: Path) -> None:
    rows = random_rows()
    rows[12, 1, 2, 3] = value
    with pytest.raises(LutError, match=r"layer 1, ids from 10: a row holds NaN"):
        build_lut(FixedRows(rows), tmp_path, dtype=dtype, chunk_tokens=5)
    assert not (tmp_path / "manifest.json").exists()


def test_float16_says_when_it_cannot_hold_a_value(tmp_path: Path) -> None:
    rows = random_rows()
    rows[3] = 1e5
    with pytest.raises(LutError, match="or more than float16 can"):
        build_lut(FixedRows(rows), tmp_path, dtype="float16")
    build_lut(FixedRows(rows), tmp_path, dtype="bfloat16", overwrite=True)


def test_memory_decides_the_chunks_and_shards_are_cut_evenly() -> None:
    plan = builder.plan(FixedRows(random_rows(vocab_size=1000)), Path("nowhere"), memory_bytes=300 * 2 * 1152)
    assert plan.buffer_bytes <= 300 * 2 * 1152
    assert -(-1000 // plan.chunk_tokens) == -(-1000 // (300 * 2 * 1152 // (plan.buffer_bytes // plan.chunk_tokens)))
