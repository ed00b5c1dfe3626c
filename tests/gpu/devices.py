"""Where tests that only a GPU can answer run: on CUDA, and on the CPU, so that none is code that never ran."""

from collections.abc import Sequence

import pytest
import torch


def on_cuda(*values: object, devices: int = 1) -> object:
    """Return parameters of a test marked `gpu`, skipped where there are fewer CUDA devices."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    needed = "a CUDA device" if devices == 1 else f"{devices} CUDA devices"
    too_few = pytest.mark.skipif(found < devices, reason=f"needs {needed}, and this machine has {found or 'none'}")
    return pytest.param(*values, marks=[pytest.mark.gpu, too_few])


def on_cpu(*values: object, slow: bool = False) -> object:
    """Return parameters of the same test without a GPU."""
    return pytest.param(*values, marks=[pytest.mark.slow, pytest.mark.release] if slow else [])


def devices(*, slow: bool = False) -> pytest.MarkDecorator:
    """Give a test its `device`; on the CPU it may be too slow for the fast suite."""
    both: Sequence[object] = (on_cpu("cpu", slow=slow), on_cuda("cuda"))
    return pytest.mark.parametrize("device", both)
