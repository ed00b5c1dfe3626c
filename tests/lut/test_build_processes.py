"""Builds in processes of their own: killed at any moment, cut short by a limit, shared out over real ranks."""

import multiprocessing
import os
import random
import resource
import time
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessRaisedException, start_processes

from src.errors import LutError
from src.lut import build_lut
from src.lut.verification import verify_table
from tests.lut.builds import FixedRows, contents, random_rows

ROWS = random_rows(vocab_size=400, hidden_size=64)
FORK = multiprocessing.get_context("fork")  # a spawned process would take seconds to import torch
FULL = 3
"""Exit code of a build that met a clear error."""


def build(lut_dir: Path, file_size_limit: int | None = None) -> None:
    if file_size_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    source = FixedRows(ROWS, lambda _: time.sleep(0.004))
    try:
        build_lut(source, lut_dir, dtype="float32", shard_bytes=100_000, chunk_tokens=5)
    except LutError as error:
        (lut_dir / "error").write_text(str(error))
        os._exit(FULL)


def start(lut_dir: Path, file_size_limit: int | None = None) -> BaseProcess:
    process = FORK.Process(target=build, args=(lut_dir, file_size_limit))
    process.start()
    return process


def finish(lut_dir: Path) -> dict[str, bytes]:
    process = start(lut_dir)
    process.join(60)
    assert process.exitcode == 0
    return contents(lut_dir)


@pytest.mark.release
@pytest.mark.slow
def test_killed_at_random_moments_a_build_ends_with_the_same_bytes(tmp_path: Path, attacks: int) -> None:
    begun = time.monotonic()
    whole = finish(tmp_path / "whole")
    build_seconds, chance, killed = time.monotonic() - begun, random.Random(0), 0
    for attempt in range(attacks):
        lut_dir = tmp_path / f"killed-{attempt}"
        for _ in range(3):
            process = start(lut_dir)
            time.sleep(chance.uniform(0, build_seconds / 2))
            process.kill()
            process.join(60)
            killed += process.exitcode != 0
            assert not (lut_dir / "manifest.json").exists() or verify_table(lut_dir) == []  # whole, or not visible
        assert finish(lut_dir) == whole
    assert killed >= attacks
    assert verify_table(tmp_path / "whole") == []


def test_a_file_size_limit_is_one_clear_error_and_the_build_goes_on_after(tmp_path: Path) -> None:
    process = start(tmp_path / "lut", file_size_limit=60_000)
    process.join(60)
    assert process.exitcode == FULL
    error = tmp_path / "lut" / "error"
    assert "rows-00000.partial: could not be written (File too large); free some space and resume" in error.read_text()
    assert not (tmp_path / "lut" / "manifest.json").exists()
    error.unlink()
    assert finish(tmp_path / "lut") == finish(tmp_path / "whole")


def build_beside(rank: int, world_size: int, lut_dir: Path, barrier: Barrier) -> None:
    build_lut(
        FixedRows(ROWS),
        lut_dir,
        dtype="float32",
        shard_bytes=100_000,
        chunk_tokens=5,
        rank=rank,
        world_size=world_size,
        barrier=barrier.wait,
    )


def test_processes_that_share_a_build_write_the_same_bytes(tmp_path: Path) -> None:
    whole = finish(tmp_path / "whole")
    for attempt in range(5):
        lut_dir, barrier = tmp_path / f"together-{attempt}", FORK.Barrier(3, timeout=60)
        ranks = [FORK.Process(target=build_beside, args=(rank, 3, lut_dir, barrier)) for rank in range(3)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [0, 0, 0]
        assert contents(lut_dir) == whole


def build_as_rank(rank: int, world_size: int, lut_dir: Path, broken: int | None) -> None:
    torch.set_num_threads(1)
    store = f"file://{lut_dir.with_suffix(f'.store-{broken}')}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)

    def before(_: int) -> None:
        if rank == broken:
            raise RuntimeError("a rank broke")

    build_lut(
        FixedRows(ROWS, before),
        lut_dir,
        dtype="nf4",
        shard_bytes=10_000,
        chunk_tokens=5,
        rank=rank,
        world_size=world_size,
        barrier=dist.barrier,
    )
    dist.destroy_process_group()


def run_ranks(lut_dir: Path, world_size: int, broken: int | None = None) -> None:
    arguments = (world_size, lut_dir, broken)
    start_processes(build_as_rank, arguments, nprocs=world_size, start_method="fork")


@pytest.mark.slow
def test_gloo_ranks_write_the_bytes_of_one_and_one_that_breaks_ends_all(tmp_path: Path) -> None:
    for world_size in (1, 2, 3):
        run_ranks(tmp_path / f"ranks-{world_size}", world_size)
        assert contents(tmp_path / f"ranks-{world_size}") == contents(tmp_path / "ranks-1")
    with pytest.raises(ProcessRaisedException, match="a rank broke"):
        run_ranks(tmp_path / "broken", 2, broken=1)
    assert not (tmp_path / "broken" / "manifest.json").exists()
    run_ranks(tmp_path / "broken", 2)
    assert contents(tmp_path / "broken") == contents(tmp_path / "ranks-1")
