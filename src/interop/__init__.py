"""The authors' Hugging Face checkpoints (JieShibo/MoLE), in and out."""

from src.interop.exporter import export_official
from src.interop.importer import import_official

__all__ = ["export_official", "import_official"]
