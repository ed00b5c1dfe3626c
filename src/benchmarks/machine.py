"""What a figure was measured on."""

import os
import platform
from pathlib import Path

import psutil
import torch


def describe_machine(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Return processor or accelerator, cores, memory and versions, without names of hosts or users."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "processor": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def machine_line(machine: dict[str, str | int]) -> str:
    """Say it in one line."""
    gibibytes = int(machine["memory_bytes"]) / 2**30
    return (
        f"{machine['processor']}, {machine['cores']} cores ({machine['threads']} threads), {gibibytes:.0f} GiB, "
        f"{machine['system']}, Python {machine['python']}, torch {machine['torch']}"
    )


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
