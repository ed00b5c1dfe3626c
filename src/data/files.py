"""Files of a corpus: which they are, how they are opened. Knows nothing of what their bytes mean."""

import bz2
import codecs
import glob
import gzip
import io
import lzma
import os
import sysconfig
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from src.data.config import SourceConfig
from src.errors import DataError
from src.system.files import expand_home

READ_BYTES = 1 << 20
_ZSTANDARD_BYTES = 1 << 10
"""Taken in at a time: what they decompress to is held in memory, at most 128 KiB for each 4 bytes."""
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}
_SYNONYMS = {
    ".gzip": ".gz",
    ".zstd": ".zst",
    ".text": ".txt",
    ".ndjson": ".jsonl",
    ".ldjson": ".jsonl",
    ".jsonlines": ".jsonl",
    ".jl": ".jsonl",
    ".pq": ".parquet",
    ".parq": ".parquet",
}
_COMPRESSED = {".gz", ".zst", ".bz2", ".xz"}
_FORMATS = {".txt", ".jsonl", ".json", ".parquet"}
_READ = ".txt, .jsonl, .json or .parquet (each also as .gz, .zst, .bz2 or .xz)"
_REFUSED = (
    ".tar .tgz .tbz .tbz2 .txz .tzst .zip .7z .rar .lz4 .lzma .br .z .csv .tsv .xls .xlsx .ods .doc .docx .odt .pdf "
    ".epub .arrow .feather .orc .avro .npy .npz .pkl .pt .safetensors .sqlite .db .warc"
)
"""Archives, tables and documents, whose bytes are not the text that is meant."""
_PLAIN = (
    ".md .rst .tex .html .htm .xml .log .sql .css .yaml .yml .toml .ini .cfg .sh .py .pyi .js .ts .c .h .cc .cpp .hpp "
    ".cs .java .kt .scala .go .rs .rb .php .pl .lua .r .swift .hs .ml .lisp .el .f90 .s .srt .vtt"
)
"""Text whatever it is about: read as `.txt` is."""


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


def source_files(source: SourceConfig, key: str = "data.files") -> list[Path]:
    """Return the files of a source, sorted; of a hub dataset those of its local folder, if it is one.

    Raises as `expand_files` does.
    """
    if source.embedded:
        return stdlib_files()
    if source.hub is not None:
        return sorted(path for path in Path(source.hub).rglob("*") if path.is_file())
    return expand_files(source.files, key)


def expand_files(patterns: Sequence[str], key: str) -> list[Path]:
    """Return the files that paths, folders and globs name, sorted. What exists as a path is no glob.

    `key` is what errors call the setting that they are from.

    Raises:
        DataError: one of them holds no file, or a file of a format that is not read.
    """
    files: set[Path] = set()
    for pattern in map(expand_home, patterns):
        matches = [Path(match) for match in glob.glob(glob.escape(pattern)) or glob.glob(pattern, recursive=True)]
        found = [path for path in matches if path.is_file()]
        found += _files_below([path for path in matches if path.is_dir()])
        if not found:
            raise DataError(f"{key}: {_nothing_found(pattern, matches)}")
        files.update(found)
    for path in sorted(files):
        if (suffix := format_suffix(path)) in _REFUSED.split():
            raise DataError(
                f"{key}: {path}: files ending in {suffix} are not read; unpack or convert it to {_READ}, or "
                "rename it to .txt if its bytes are the text to train on"
            )
    return sorted(files)


def _files_below(folders: Sequence[Path]) -> list[Path]:
    below = ((folder, path) for folder in folders for path in folder.rglob("*") if path.is_file())
    return [
        path
        for folder, path in below
        if format_suffix(path) in _FORMATS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)  # caches, version control
    ]


def _nothing_found(pattern: str, matches: Sequence[Path]) -> str:
    if matches:
        return f"the folder {pattern!r} holds no file ending in {_READ}"
    return f"{pattern!r} matches no file; give a path, a folder or a glob of text files"


def format_suffix(path: Path) -> str:
    """Return the ending that names a file's format, without its compression: `.jsonl` of `a.NDJSON.zst`."""
    return last_suffix(Path(path.stem)) if last_suffix(path) in _COMPRESSED else last_suffix(path)


def last_suffix(path: Path) -> str:
    """Return the last ending in lower case, by its usual name."""
    return _SYNONYMS.get(path.suffix.lower(), path.suffix.lower())


def unknown_formats(files: Sequence[Path]) -> list[Path]:
    """Return the files whose ending says nothing known here, so that they are read as text."""
    known = {"", *_FORMATS, *_PLAIN.split()}
    return [path for path in files if format_suffix(path) not in known]


def inputs_of(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Return what shows whether files have changed: path, size in bytes, modification time in nanoseconds."""
    states = ((path, path.stat()) for path in files)
    return [(str(path.resolve()), state.st_size, state.st_mtime_ns) for path, state in states]


@contextmanager
def open_file(path: Path) -> Generator[OpenFile]:
    """Open a file and decompress it by its ending, without a byte-order mark at its start.

    Raises:
        DataError: the file cannot be read, or turns out damaged while it is read.
    """
    try:
        with path.open("rb", buffering=READ_BYTES) as raw:
            marked = _decompressed(raw, last_suffix(path)).read(3) == codecs.BOM_UTF8
            raw.seek(0)
            data = _decompressed(raw, last_suffix(path))
            if marked:
                data.read(3)
            yield OpenFile(data, raw)
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # from the system, not from a decompressor
            raise DataError(f"{path}: cannot be read ({os.strerror(error.errno)})") from error
        raise DataError(f"{path}: damaged or cut off ({error}); fetch the file again") from error


def _decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    match suffix:
        case ".gz":
            return io.BufferedReader(gzip.GzipFile(fileobj=raw), READ_BYTES)
        case ".bz2":
            return io.BufferedReader(bz2.BZ2File(raw), READ_BYTES)
        case ".xz":
            return io.BufferedReader(lzma.LZMAFile(raw), READ_BYTES)
        case ".zst":
            return io.BufferedReader(_Zstandard(raw), READ_BYTES)
        case _:
            return raw


class _Zstandard(io.RawIOBase):
    """Decompresses frames of any window, which `pyarrow` does not, and notices a cut, which `zstandard` does not."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._frame, self._input = raw, None, b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(_ZSTANDARD_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = self._frame.unused_data
            self._frame = None if self._frame.eof else self._frame
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size
