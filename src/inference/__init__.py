"""Inference from a run directory: load either form, generate."""

from src.inference.generation import generate, left_pad, stream
from src.inference.loader import InferenceModel, load_model

__all__ = ["InferenceModel", "generate", "left_pad", "load_model", "stream"]
