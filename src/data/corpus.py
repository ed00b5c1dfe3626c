"""Where documents come from, and which of them are held out. Knows no tokens."""

import glob
import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from src.errors import DataError

_STDLIB_SKIPPED = {"site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}


@dataclass(frozen=True)
class Document:
    """One text and the file it came from."""

    path: Path
    text: str

    @property
    def content_hash(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def stdlib_files() -> list[Path]:
    """Sources of the running interpreter's standard library, without tests and bundled applications."""
    root = Path(sysconfig.get_path("stdlib"))
    found = (path for path in root.rglob("*.py") if _is_library(path.relative_to(root)))
    return sorted(found)


def _is_library(relative: Path) -> bool:
    return not any(part in _STDLIB_SKIPPED or part.startswith("test") for part in relative.parts)


def expand_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that patterns name, sorted; DataError names a pattern that matches nothing."""
    files: set[Path] = set()
    for pattern in patterns:
        matches = [Path(match) for match in glob.glob(pattern, recursive=True) if Path(match).is_file()]
        if not matches:
            raise DataError(f"data.files: {pattern!r} matches no file; give a path or a glob of text files")
        files.update(matches)
    return sorted(files)


def read_documents(patterns: Sequence[str]) -> Iterator[Document]:
    """Yield the non-empty documents of `patterns`, or of the standard library when there are none."""
    for path in expand_files(patterns) if patterns else stdlib_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 at byte {error.start}; convert the file or leave it out") from error
        if text.strip():
            yield Document(path, text)


def is_held_out(document: Document, fraction: float, seed: int) -> bool:
    """Decide by content, so that a document stays on its side whatever else the corpus holds."""
    digest = hashlib.sha256(f"{seed} {document.content_hash}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
