"""JSON documents that are sealed by their own SHA-256: written, read, and read with distrust.

Knows nothing of what a document says.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.errors import LutFormatError
from src.lut.integrity import sha256

MAX_BYTES = 64 * 2**20
"""No document of a table is larger; a larger file is not read."""


def sealed_text(values: Mapping[str, object]) -> str:
    """Return the one text that a document of these values has, with the SHA-256 of its canonical form inside."""
    body = {key: value for key, value in values.items() if key != "sha256"}
    seal = sha256(json.dumps(body, sort_keys=True).encode())
    return json.dumps({**body, "sha256": seal}, indent=1) + "\n"


def read_document(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return a JSON object and the bytes it was read from; LutFormatError names the file when it is anything else."""
    if (size := path.stat().st_size) > MAX_BYTES:
        raise LutFormatError(f"{path}: {size:,} bytes, but it never has more than {MAX_BYTES:,}; rebuild the table")
    written = path.read_bytes()
    try:
        document = json.loads(written.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise LutFormatError(f"{path}: not valid JSON ({error}); rebuild the table") from error
    if not isinstance(document, dict):
        raise LutFormatError(f"{path}: holds a {type(document).__name__}, expected an object; rebuild the table")
    return document, written


def require_seal(document: Mapping[str, object], written: bytes, path: Path) -> None:
    """Raise LutFormatError unless the bytes are exactly what a writer makes of these values."""
    try:
        expected = sealed_text(document).encode()
    except RecursionError as error:
        raise LutFormatError(f"{path}: is nested too deeply to be a document of ours; rebuild the table") from error
    if written != expected:
        raise LutFormatError(f"{path}: its text does not match its own sha256, so it was edited; rebuild the table")


def integer(values: Mapping[str, object], key: str, path: Path, lowest: int, highest: int) -> int:
    """Return an integer in [lowest, highest]; LutFormatError names file, field and what was found."""
    value = values[key]
    if type(value) is not int or not lowest <= value <= highest:
        raise LutFormatError(f"{path}: {key} is {_shown(value)}, expected an integer in [{lowest}, {highest}]")
    return value


def text(values: Mapping[str, object], key: str, path: Path) -> str:
    """Return a string; LutFormatError names file, field and what was found."""
    value = values[key]
    if not isinstance(value, str):
        raise LutFormatError(f"{path}: {key} is {_shown(value)}, expected text; rebuild the table")
    return value


def optional_text(values: Mapping[str, object], key: str, path: Path) -> str | None:
    """Return a string or None."""
    return None if values[key] is None else text(values, key, path)


def _shown(value: object) -> str:
    """Show a value of any size in a message."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a number of more than 64 bits"
    return repr(value)[:40] if isinstance(value, (int, float, str, bool)) or value is None else type(value).__name__
