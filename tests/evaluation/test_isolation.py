"""Looking at a model in training leaves modes, gradients and every random generator as they were."""

import random

import numpy as np
import pytest
import torch

from src.evaluation.suite import evaluating
from tests.model.models import MOLE, build


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seed() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool) -> None:
    model = build(MOLE).train()
    model.norm.eval()  # a mode of its own
    seed()
    expected = draw()
    seed()
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            assert not model(torch.tensor([[1, 2]])).requires_grad
            draw()
            if fails:
                raise RuntimeError("scoring failed")
    except RuntimeError:
        assert fails
    assert draw() == expected
    assert model.training
    assert not model.norm.training
    assert model(torch.tensor([[1, 2]])).requires_grad
