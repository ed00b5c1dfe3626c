"""What this machine can do: its precision, matrix-product rate and memory."""

import ctypes
import importlib
import os
import platform
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch

from src.errors import UserError

_PROCESSOR_SIZE, _ACCELERATOR_SIZE, _REPEATS = 1024, 8192, 6
"""Widths of a product that reaches the rate and takes a fraction of a second."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # mallopt(3), malloc.h


def require_posix(work: str) -> None:
    """Raise UserError where the system lacks what writing with several processes needs: on Windows."""
    try:
        importlib.import_module("fcntl")
    except ImportError:
        raise UserError(
            f"{work} runs on Linux and macOS, and this is {sys.platform}; use WSL 2 or one of these systems. Finished "
            "runs can be read here: generate, evaluate, verify, inspect_lut, convert"
        ) from None


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the operations per second of a large matrix product, the reference of model FLOPs utilization."""
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
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: allocated on an accelerator, resident for a process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Windows, where nothing is trained, has none

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resolved_accelerator(accelerator: str) -> str:
    """Return `cpu` or `cuda`; `auto` means neither of the others that Lightning knows, which lack our float64."""
    return "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def native_precision(accelerator: str) -> Literal["bf16-mixed", "32-true"]:
    """Return bf16-mixed if what `trainer.accelerator` selects computes in bfloat16, else 32-true."""
    if resolved_accelerator(accelerator) == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_tile"))
    return "bf16-mixed" if native else "32-true"


def device_count(accelerator: str) -> int:
    """Return how many devices of this machine `trainer.accelerator` can use; the CPU is one."""
    return torch.cuda.device_count() if resolved_accelerator(accelerator) == "cuda" else 1


def processor_name() -> str:
    """Return the processor's model."""
    with suppress(OSError, StopIteration), Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_devices(accelerator: str, devices: str) -> None:
    """Raise UserError where this machine lacks what `trainer.accelerator` and `trainer.devices` select."""
    on_cuda = accelerator != "cpu" and torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not on_cuda:
        raise UserError(
            f"trainer.accelerator: {accelerator}, but this machine has no usable CUDA device; take cpu or auto"
        )
    if not on_cuda and (devices == "-1" or "," in devices):
        raise UserError(
            f"trainer.devices: {devices!r} selects CUDA devices, but this run is on the CPU; give a number of processes"
        )
    count = torch.cuda.device_count() if on_cuda else 0
    wanted = [int(index) + 1 for index in devices.split(",") if index] if "," in devices else [devices]
    if on_cuda and any(int(number) > count for number in wanted if number != "auto"):
        raise UserError(f"trainer.devices: {devices!r}, but this machine has {count} CUDA devices; take some of them")


def keep_freed_memory() -> None:
    """Tell glibc, if it is the C library, to reuse large freed blocks instead of returning them to the system.

    Mapping and zeroing the pages of activations again in every step took a quarter of the quick start's step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
