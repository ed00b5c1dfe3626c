"""Random generators go on where they were, by way of a file that holds plain values alone."""

import random
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from src.system.random_state import capture_random_state, restore_random_state
from src.training.strategy import StreamingCheckpointIO


def draw() -> list[float]:
    return [random.random(), random.gauss(), float(np.random.normal()), float(torch.rand(()))]


def test_generators_repeat_what_they_drew(tmp_path: Path) -> None:
    draw()  # leaves halves of pairs of normal numbers behind
    StreamingCheckpointIO().save_checkpoint({"random": capture_random_state()}, tmp_path / "x.ckpt")
    drawn = [draw() for _ in range(3)]
    restore_random_state(StreamingCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")["random"])
    assert [draw() for _ in range(3)] == drawn


def test_a_process_that_does_not_use_cuda_does_not_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Mock(side_effect=RuntimeError("Cannot re-initialize CUDA in forked subprocess"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, started)
    state = capture_random_state()
    restore_random_state({**state, "cuda": torch.zeros(16, dtype=torch.uint8)})  # of a run on a GPU
    assert "cuda" not in state
    started.assert_not_called()
