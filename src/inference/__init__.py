"""Inference from a run directory: load either form, generate."""

from src.inference.generation import generate
from src.inference.loader import InferenceModel, load_model

__all__ = ["InferenceModel", "generate", "load_model"]
