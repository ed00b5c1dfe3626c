"""Readers: bytes of rows by token id. They know files and offsets, not what the bytes mean."""

from src.lut.readers import memory, pread
from src.lut.readers.reader import READERS, Reader, ResidentTable, register_reader

__all__ = ["READERS", "Reader", "ResidentTable", "memory", "pread", "register_reader"]
