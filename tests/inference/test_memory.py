"""Inference from disk needs the memory of a dense model, and little more than that is enough."""

import mmap
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from src.benchmarks.common import model_config
from src.benchmarks.memory_use import anonymous_bytes, sampled_peak
from src.benchmarks.workload import write_runs
from src.inference.disk_experts import DiskExperts
from src.lut import LutStore
from tests.inference.cgroups import memory_cgroup
from tests.lut.tables import write_table

MEBIBYTE = 2**20


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon:")))


def test_the_sampler_sees_memory_that_is_given_back() -> None:
    before = anonymous()
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # a mapping of its own, whatever the allocator keeps
    with sampled_peak(anonymous, 0.002) as peak, mmap.mmap(-1, 64 * MEBIBYTE, flags=private) as given_back:
        given_back.write(b"1" * (64 * MEBIBYTE))
        time.sleep(0.1)
    assert peak[0] - before >= 60 * MEBIBYTE


def test_decoding_touches_no_fresh_memory(tmp_path: Path) -> None:
    write_table(tmp_path, vocab_size=40, num_layers=12, num_experts=4, hidden_size=768)  # rows of 18 pages
    with LutStore.open(tmp_path) as store:
        experts, before = DiskExperts(store), 0
        for step in range(110):
            if step == 10:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            rows = experts.rows(torch.arange(step % 30, step % 30 + 4), torch.zeros(4, 768))
            assert rows(3).shape == (4, 4, 768)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 100  # 7,200 pages were filled


@pytest.mark.slow
@pytest.mark.alone
def test_disk_inference_runs_within_denses_peak_and_a_little(tmp_path: Path) -> None:
    config = replace(model_config("160m-4e"), vocab_size=8192)  # a table of 600 MB
    mole, dense = write_runs(tmp_path, config, "bfloat16", None)
    held_out = torch.randint(8192, (4096,), generator=torch.Generator().manual_seed(0))
    assert anonymous_bytes(mole, 1, held_out) - anonymous_bytes(dense, 1, held_out) <= 96 * MEBIBYTE
    anonymous_ids = ["-m", "src.benchmarks.memory_use"]
    with memory_cgroup() as free:
        done = free.run([*anonymous_ids, str(dense), str(dense / "prompt-ids.npy")])
        assert done.returncode == 0, done.stderr
        limit = free.peak() + 256 * MEBIBYTE
    with memory_cgroup() as unlimited:
        done = unlimited.run([*anonymous_ids, str(mole), str(mole / "prompt-ids.npy")])
        assert done.returncode == 0, done.stderr
        seconds = float(done.stdout.split()[1])
    with memory_cgroup() as tight:
        tight.limit(limit)
        done = tight.run([*anonymous_ids, str(mole), str(mole / "prompt-ids.npy")])
        assert done.returncode == 0, done.stderr
        assert tight.peak() <= limit
        assert float(done.stdout.split()[1]) <= 1.2 * seconds
