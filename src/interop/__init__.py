"""Other people's checkpoints, in and out: one file per family."""

from src.interop import llama, mistral, qwen2, qwen3
from src.interop.export import export_huggingface
from src.interop.families import FAMILIES, Family, register_family
from src.interop.huggingface import import_huggingface
from src.interop.official import export_official, import_official
from src.interop.remote_folder import import_exported

__all__ = [
    "FAMILIES",
    "Family",
    "export_huggingface",
    "export_official",
    "import_exported",
    "import_huggingface",
    "import_official",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "register_family",
]
