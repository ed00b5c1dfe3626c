"""Other people's checkpoints, in and out: one file per family."""

from src.interop.families import FAMILIES, Family, register_family
from src.interop.official import export_official, import_official

__all__ = ["FAMILIES", "Family", "export_official", "import_official", "register_family"]
