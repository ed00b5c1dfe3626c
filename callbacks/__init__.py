"""Thin Lightning adapters over `src`: when something happens, not how."""

from callbacks.evaluation import EvaluationCallback
from callbacks.reparameterize import ReparameterizeCallback
from callbacks.throughput import ThroughputCallback

__all__ = ["EvaluationCallback", "ReparameterizeCallback", "ThroughputCallback"]
