"""The lookup table: the contract between training and inference."""

from src.lut.builder import build_lut
from src.lut.manifest import Manifest, read_manifest
from src.lut.store import LutStore, RowRequest

__all__ = ["LutStore", "Manifest", "RowRequest", "build_lut", "read_manifest"]
