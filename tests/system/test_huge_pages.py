"""Memory in huge pages holds what it held, starts empty, and is no larger than asked for."""

import ctypes
import mmap
import sys
from pathlib import Path

import pytest
import torch

from src.system import huge_pages
from src.system.huge_pages import HUGE_PAGE, collapse, huge_bytes


@pytest.mark.parametrize("num_bytes", [0, 1, 4097, HUGE_PAGE // 2 + 1, HUGE_PAGE + 3])
def test_new_memory_is_writable_zeros_from_the_start_of_a_page(num_bytes: int) -> None:
    memory = huge_bytes(num_bytes)
    assert memory.shape == (num_bytes,) and memory.dtype == torch.uint8 and not memory.any()
    assert sys.platform != "linux" or not num_bytes or memory.data_ptr() % 4096 == 0
    assert memory.fill_(7).eq(7).all()


def test_a_system_without_huge_pages_gives_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(huge_pages.mmap, "MADV_HUGEPAGE", raising=False)
    assert not huge_bytes(2 * HUGE_PAGE).any()


@pytest.mark.skipif(sys.platform != "linux", reason="no madvise")
def test_values_stay_when_their_memory_moves() -> None:
    tensors = [torch.randint(256, (size,), dtype=torch.uint8) for size in (3 * HUGE_PAGE, 5 * HUGE_PAGE + 17, 100)]
    before = [tensor.clone() for tensor in tensors]
    collapse((tensor.data_ptr(), tensor.nbytes) for tensor in tensors)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="no madvise")
def test_memory_moves_to_huge_pages_where_the_kernel_has_them() -> None:
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not mode.is_file() or "[never]" in mode.read_text():
        pytest.skip("this kernel has no huge pages")
    before = _huge_bytes_of_process()
    memory = mmap.mmap(-1, 16 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
    if _huge_bytes_of_process() > before:
        pytest.skip("this kernel gives huge pages unasked")
    start, third = tensor.data_ptr(), tensor.nbytes // 3
    collapse([(start + third, tensor.nbytes - third), (start, third)])  # neighbors, in any order
    if ctypes.CDLL(None).madvise(
        ctypes.c_void_p(-start % HUGE_PAGE + start), ctypes.c_size_t(HUGE_PAGE), huge_pages._COLLAPSE
    ):
        pytest.skip("this kernel cannot move memory to huge pages, or has none left")
    assert _huge_bytes_of_process() - before >= 15 * HUGE_PAGE
    assert tensor.eq(1).all()


def test_neighbors_count_as_one_range() -> None:
    far = 2**20
    assert huge_pages._joined([(far, 8), (104, 16), (0, 100)]) == [(0, 120), (far, far + 8)]
    assert huge_pages._joined([]) == []


def _huge_bytes_of_process() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))
