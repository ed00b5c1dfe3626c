"""Looking at a model in training without leaving a trace."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from src.checkpointing.random_state import capture_random_state, restore_random_state
from src.model import Transformer


@contextmanager
def evaluating(model: Transformer) -> Generator[None]:
    """Evaluate in full precision, without gradients; leave every mode and every random generator as they were."""
    modes = {name: module.training for name, module in model.named_modules()}
    random_state = capture_random_state()
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.embedding.weight.device.type, enabled=False):
            yield
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
        restore_random_state(random_state)
