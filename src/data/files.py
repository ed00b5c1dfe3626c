"""Files of a corpus: which they are, how they are opened. Knows nothing of what their bytes mean."""

import glob
import gzip
import io
import os
import sysconfig
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow

from src.data.config import SourceConfig
from src.errors import DataError

READ_BYTES = 1 << 20
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}
_COMPRESSED = {".gz", ".zst"}
_FOLDER_SUFFIXES = {".txt", ".jsonl", ".json", ".parquet"}


@dataclass(frozen=True)
class OpenFile:
    """A file being read."""

    data: BinaryIO
    """Its bytes, decompressed."""
    raw: BinaryIO
    """The file itself; its position is the progress of reading."""


def stdlib_files() -> list[Path]:
    """Sources of the running interpreter's standard library, without tests and bundled applications."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = [name for name in subfolders if _is_library(name)]
        found += [Path(folder, name) for name in names if name.endswith(".py") and _is_library(name)]
    return sorted(found)


def _is_library(name: str) -> bool:
    return name not in _STDLIB_SKIPPED and not name.startswith("test")


def source_files(source: SourceConfig) -> list[Path]:
    """Return the files of a source, sorted; of a hub dataset those of its local folder, if it is one."""
    if source.embedded:
        return stdlib_files()
    if source.hub is not None:
        return sorted(path for path in Path(source.hub).rglob("*") if path.is_file())
    return expand_files(source.files)


def expand_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that paths, folders and globs name, sorted; DataError names one that holds nothing."""
    files: set[Path] = set()
    for pattern in patterns:
        matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
        found = [path for path in matches if path.is_file()]
        found += _files_below([path for path in matches if path.is_dir()])
        if not found:
            raise DataError(_nothing_found(pattern, matches))
        files.update(found)
    return sorted(files)


def _files_below(folders: Sequence[Path]) -> list[Path]:
    below = ((folder, path) for folder in folders for path in folder.rglob("*") if path.is_file())
    return [
        path
        for folder, path in below
        if format_suffix(path) in _FOLDER_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)  # caches, version control
    ]


def _nothing_found(pattern: str, matches: Sequence[Path]) -> str:
    if matches:
        kinds = ", ".join(sorted(_FOLDER_SUFFIXES))
        return f"data.files: the folder {pattern!r} holds no file ending in {kinds} (or those with .gz or .zst)"
    return f"data.files: {pattern!r} matches no file; give a path, a folder or a glob of text files"


def format_suffix(path: Path) -> str:
    """Return the ending that names a file's format, without its compression: `.jsonl` of `a.jsonl.zst`."""
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def inputs_of(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Return what shows whether files have changed: path, size in bytes, modification time in nanoseconds."""
    states = ((path, path.stat()) for path in files)
    return [(str(path.resolve()), state.st_size, state.st_mtime_ns) for path, state in states]


@contextmanager
def open_file(path: Path) -> Generator[OpenFile]:
    """Open a file and decompress it by its ending; DataError names it if it turns out damaged while it is read."""
    try:
        with path.open("rb", buffering=READ_BYTES) as raw, _decompressed(raw, path.suffix) as data:
            yield OpenFile(data, raw)
    except (zlib.error, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # from the system, not from a decompressor
            raise DataError(f"{path}: cannot be read ({os.strerror(error.errno)})") from error
        raise DataError(f"{path}: damaged or cut off ({error}); fetch the file again") from error


def _decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), READ_BYTES)
    if suffix == ".zst":
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), READ_BYTES)
    return raw
