"""Thin Lightning adapters over `src`: when something happens, not how."""

from callbacks.evaluation import EvaluationCallback
from callbacks.progress import StepProgressBar
from callbacks.reparameterize import ReparameterizeCallback
from callbacks.throughput import ThroughputCallback

__all__ = ["EvaluationCallback", "ReparameterizeCallback", "StepProgressBar", "ThroughputCallback"]
