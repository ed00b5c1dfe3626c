"""The way from a sampled id to its row and on to the logits is short: files entered, calls made, ids sorted."""

import os
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from src.inference import load_model, stream
from src.inference.generation import Sampler
from tests.inference.runs import prompts, write_run

SRC = str(Path(__file__).parents[2] / "src") + os.sep
READS = tuple(getattr(os, name) for name in ("preadv", "pread", "readv", "read") if hasattr(os, name))


@dataclass
class Step:
    """What ran between one call of the sampler and the next, on all threads."""

    files: set[str] = field(default_factory=set)
    files_to_read: set[str] | None = None
    calls: int = 0
    calls_to_read: int = 0
    sorts: int = 0


class Profile:
    """Counts entered functions of `src` from the sampler's return to its next call."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._open: Step | None = None

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if code is Sampler.__call__.__code__:
            if event == "call" and self._open is not None:
                self.steps.append(self._open)
            self._open = Step() if event == "return" else None
        step = self._open
        if step is None:
            return
        if event == "call" and code.co_filename.startswith(SRC):
            step.calls += 1
            step.files.add(code.co_filename.removeprefix(SRC))
        elif event == "call" and code.co_name == "unique" and code.co_filename.endswith("_tensor.py"):
            step.sorts += 1
        elif event == "c_call" and argument in READS and step.files_to_read is None:
            step.files_to_read, step.calls_to_read = set(step.files), step.calls


@contextmanager
def profiled() -> Generator[Profile]:
    """Profile this thread and those that start inside."""
    profile = Profile()
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield profile
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 4])
def test_a_decode_step_is_a_short_walk(tmp_path: Path, batch: int) -> None:
    with load_model(write_run(tmp_path, dtype="bfloat16"), experts="lut", dtype=torch.bfloat16) as model:
        steps = stream(model, prompts(batch, 9), max_new_tokens=6)
        next(steps)  # the prompt, and whatever is set up once
        with profiled() as profile:
            for _ in steps:
                pass
    assert len(profile.steps) == 4  # the last id is not fed
    for step in profile.steps:
        assert step.files_to_read is not None
        assert len(step.files) <= 13, sorted(step.files)
        assert len(step.files_to_read) <= 5, sorted(step.files_to_read)
        assert step.calls_to_read <= 9
        assert step.sorts == (batch > 1)
