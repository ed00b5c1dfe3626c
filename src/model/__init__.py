"""The model, in pure torch: no Lightning, no config files, no disk."""

from src.model.attention import KeyValueCache
from src.model.config import ModelConfig
from src.model.transformer import Transformer, TrunkOutput

__all__ = ["KeyValueCache", "ModelConfig", "Transformer", "TrunkOutput"]
