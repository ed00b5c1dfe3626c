"""Thin Lightning adapters over `src`: they decide when something happens, not how."""

from callbacks.checkpoints import AveragedWeights, BestWeightsCallback, CheckpointCallback, RandomStateCallback
from callbacks.dashboard import DashboardCallback
from callbacks.evaluation import EvaluationCallback
from callbacks.failures import NonFiniteCallback, RankFailureCallback, RunCallback
from callbacks.lora import LoraCallback
from callbacks.progress import StepProgressBar, ThroughputCallback, TimeLimit
from callbacks.reparameterize import ReparameterizeCallback

__all__ = [
    "AveragedWeights",
    "BestWeightsCallback",
    "CheckpointCallback",
    "DashboardCallback",
    "EvaluationCallback",
    "LoraCallback",
    "NonFiniteCallback",
    "RandomStateCallback",
    "RankFailureCallback",
    "ReparameterizeCallback",
    "RunCallback",
    "StepProgressBar",
    "ThroughputCallback",
    "TimeLimit",
]
