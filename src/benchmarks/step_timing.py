"""One training step of a layer stack, timed by phase: what `src.benchmarks.train` compares.

The stack has no vocabulary head, since the head is the same for every contestant and would hide what differs.
"""

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from src.hardware import synchronize
from src.model import ModelConfig, Transformer
from src.model.experts import LayerExperts, mix
from src.model.router import Routing, router_probs
from src.model.step_rows import StepRows

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of one step, by phase."""

    forward: float
    backward: float
    optimizer: float

    @property
    def compute(self) -> float:
        """Seconds of the forward and backward passes."""
        return self.forward + self.backward

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.forward + self.backward + self.optimizer


class Parts:
    """What MoLE adds to Dense, each alone: the experts on the distinct ids of a micro-batch, and the mixture."""

    def __init__(self, config: ModelConfig, token_ids: Tensor, dtype: torch.dtype | None) -> None:
        """Prepare one layer for `token_ids` (B, T) int64."""
        torch.manual_seed(0)
        ids, self._inverse = token_ids.unique(return_inverse=True)
        self._layers, self._dtype = config.num_layers, dtype
        self._experts = LayerExperts(config).to(token_ids.device)
        for parameter in self._experts.parameters():
            torch.nn.init.normal_(parameter, std=config.init_std)
        self._embeddings = torch.randn(len(ids), config.hidden_size, device=token_ids.device, requires_grad=True)
        shape = (*token_ids.shape, config.num_experts)
        self._logits = torch.randn(shape, device=token_ids.device, requires_grad=True)
        self._rows = self._run_experts().detach().requires_grad_()  # (U, E, D)

    def experts(self) -> float:
        """Seconds of all layers' experts, forward and backward."""
        return self._layers * self._timed(self._run_experts)

    def mixture(self) -> float:
        """Seconds of all layers' mixtures, forward and backward."""
        return self._layers * self._timed(self._run_mixture)

    def _run_experts(self) -> Tensor:
        with _autocast(self._embeddings.device, self._dtype):
            return self._experts(self._embeddings)

    def _run_mixture(self) -> Tensor:
        return mix(self._rows, Routing(self._logits, router_probs(self._logits), None), self._inverse)

    def _timed(self, work: Callable[[], Tensor]) -> float:
        forward, output = timed(work, self._embeddings.device)
        gradient = torch.ones_like(output)
        started = time.perf_counter()
        output.backward(gradient)
        synchronize(self._embeddings.device)
        return forward + time.perf_counter() - started


class Contestant:
    """A model and the micro-batches of its step."""

    def __init__(self, name: str, config: ModelConfig, batch: Tensor, dtype: torch.dtype | None) -> None:
        """Build the model on the device of `batch` (A, B, T) int64; `dtype` is autocast's, None computes in float32."""
        self.name, self.config, self.batch, self.dtype = name, config, batch, dtype
        torch.manual_seed(0)
        self.model = Transformer(config).to(batch.device)
        self.model.head.requires_grad_(False)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, fused=True)

    def step(self) -> StepTimes:
        """Take one optimiser step on all micro-batches."""
        forward = backward = 0.0
        shared: StepRows | None = None
        if self.config.expert_execution == "unique_per_step":
            forward, shared = self._timed(self._share_rows)
        for index, token_ids in enumerate(self.batch):
            seconds, loss = self._timed(lambda index=index, ids=token_ids: self._loss(index, ids, shared))
            forward += seconds
            backward += self._timed(loss.backward)[0]
        optimizer = self._timed(self.optimizer.step)[0]
        self.optimizer.zero_grad()
        return StepTimes(forward=forward, backward=backward, optimizer=optimizer)

    def peak_bytes(self) -> int | None:
        """Memory that a step takes at its peak above what is resident before it; None where it cannot be told."""
        self.step()
        return peak_bytes(self.step, self.batch.device)

    def _share_rows(self) -> StepRows:
        with _autocast(self.batch.device, self.dtype):
            return StepRows(self.model, self.batch)

    def _loss(self, index: int, token_ids: Tensor, shared: StepRows | None) -> Tensor:
        rows = shared.micro_batch(index) if shared is not None else None
        with _autocast(self.batch.device, self.dtype):
            loss = self.model.trunk(token_ids, expert_rows=rows).hidden_states.float().square().mean()
        return loss + shared.carried() if shared is not None and index + 1 == len(self.batch) else loss

    def _timed(self, work: Callable[[], Result]) -> tuple[float, Result]:
        return timed(work, self.batch.device)


def timed(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Run `work` and return its seconds, the device's included, and its result."""
    started = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - started, result


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Memory that `work` takes at its peak above what is resident before it; None where it cannot be told."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    _release_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def _release_freed_memory() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return 1024 * int(line.split()[1])
