"""Random generators go on where they were, by way of a file that holds plain values alone."""

import random
from pathlib import Path

import numpy as np
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
