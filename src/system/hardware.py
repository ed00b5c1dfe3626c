"""What the machine under a run can do, measured rather than looked up."""

import ctypes
import resource
import statistics
import sys
import time
from typing import Literal

import torch

_PROCESSOR_SIZE, _ACCELERATOR_SIZE, _REPEATS = 1024, 8192, 6
"""Widths of a product large enough to reach the rate and small enough to be over at once."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # mallopt(3), malloc.h


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a large matrix product: what model FLOPs utilisation is measured against."""
    size = _PROCESSOR_SIZE if device.type == "cpu" else _ACCELERATOR_SIZE
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    seconds: list[float] = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        _ = left @ right
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[2:])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: allocated on an accelerator, resident for a process on the processor."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def native_precision(accelerator: str) -> Literal["bf16-mixed", "32-true"]:
    """Return bf16-mixed if what `trainer.accelerator` selects computes in bfloat16, else 32-true."""
    if accelerator != "cpu" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_tile"))
    return "bf16-mixed" if native else "32-true"


def keep_freed_memory() -> None:
    """Tell glibc to reuse large freed blocks instead of returning them to the system (elsewhere: do nothing).

    Activations come and go every step; mapping and zeroing their pages anew took a quarter of the quick start's step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
