"""Readers: bytes of rows by token id. They know files and offsets, not what the bytes mean."""

from src.lut.readers.direct import READERS, open_reader
from src.lut.readers.reader import Fetch, Reader, Wanted

__all__ = ["READERS", "Fetch", "Reader", "Wanted", "open_reader"]
