"""Routing traces that are written by hand."""

from collections.abc import Sequence

import torch

from src.benchmarks.routing import RoutingTrace


def trace_of(choices: Sequence[Sequence[tuple[int, int]]], num_experts: int = 10) -> RoutingTrace:
    """A trace of hand-written choices, token by token and layer by layer."""
    return RoutingTrace(torch.tensor(choices), num_experts, {"model": "by hand"})
