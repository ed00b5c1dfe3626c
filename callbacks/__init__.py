"""Thin Lightning adapters over `src`: when something happens, not how."""

from callbacks.checkpoints import CheckpointCallback
from callbacks.dashboard import DashboardCallback
from callbacks.evaluation import EvaluationCallback
from callbacks.final_weights import BestWeightsCallback
from callbacks.non_finite import NonFiniteCallback
from callbacks.progress import StepProgressBar
from callbacks.random_state import RandomStateCallback
from callbacks.rank_failure import RankFailureCallback
from callbacks.reparameterize import ReparameterizeCallback
from callbacks.throughput import ThroughputCallback
from callbacks.time_limit import TimeLimit

__all__ = [
    "BestWeightsCallback",
    "CheckpointCallback",
    "DashboardCallback",
    "EvaluationCallback",
    "NonFiniteCallback",
    "RandomStateCallback",
    "RankFailureCallback",
    "ReparameterizeCallback",
    "StepProgressBar",
    "ThroughputCallback",
    "TimeLimit",
]
