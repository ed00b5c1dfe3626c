"""Other people's checkpoints, in and out: one file per family."""

from src.interop import llama, mistral, qwen2, qwen3
from src.interop.families import FAMILIES, Family, register_family
from src.interop.huggingface import import_huggingface
from src.interop.official import export_official, import_official

__all__ = [
    "FAMILIES",
    "Family",
    "export_official",
    "import_huggingface",
    "import_official",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "register_family",
]
