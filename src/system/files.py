"""Files that appear whole or not at all. Knows nothing of their contents."""

import errno
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from src.errors import DISK_FULL, UserError, WriteError, causes
from src.system.locks import lock, note_missing_locks

T = TypeVar("T")
LONGEST_NAME = 255
"""Bytes of a file's name, on every common file system."""
VISIBLE_SECONDS = 90.0
"""Time after which every machine sees a file: NFS keeps what it knows of a directory for at most 60 s by default."""


def expand_home(path: str) -> str:
    """Return a path with `~` or `~user` at its start as that home directory; unchanged where there is none.

    UserError where no system takes it for a path: a name in it is too long, or it holds a NUL.
    """
    expanded = os.path.expanduser(path)  # noqa: PTH111 - pathlib raises for an unknown user
    if "\0" in expanded or any(len(os.fsencode(name)) > LONGEST_NAME for name in Path(expanded).parts):
        raise UserError(f"{path[:80]!r} is no path: it holds a NUL, or a name of more than {LONGEST_NAME} bytes")
    return expanded


def when_visible(read: Callable[[], T], missing: type[Exception] = FileNotFoundError) -> T:
    """Return what `read` returns once it no longer raises `missing`; it gets `VISIBLE_SECONDS`.

    For files that another machine has just written: NFS may answer for a minute that there is no such file.
    """
    until = time.monotonic() + VISIBLE_SECONDS
    while True:
        try:
            return read()
        except missing:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` survive a power cut (no effect where directories cannot be opened)."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Generator[Path]:
    """Yield a temporary path next to `path`; flush and rename it when the block succeeds, remove it when it raises.

    WriteError where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path, temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            with temporary.open("rb+") as handle:
                os.fsync(handle.fileno())
            temporary.chmod(mode)  # some writers create files that only their owner may read
            temporary.replace(path)
            sync_directory(path.parent)
    finally:
        with suppress(OSError):  # why the file is still there is told already
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Generator[Path]:
    """Yield a new directory next to `path`; rename it when the block succeeds, remove it when it raises.

    WriteError where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path, temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            temporary.rename(path)
            sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


COPY_BYTES = 4 * 2**20
"""Copied between two steps of a progress bar."""


def copy_file(source: Path, target: Path, advance: Callable[[int], object]) -> None:
    """Copy the contents of a file to a new one; `advance` learns of each part's bytes."""
    with source.open("rb") as reader, target.open("xb") as writer:
        while part := reader.read(COPY_BYTES):
            writer.write(part)
            advance(len(part))


def link_or_copy(source: Path, target: Path, advance: Callable[[int], object]) -> None:
    """Make `target` a hard link to a file that nothing changes in place, or a copy where there are no such links."""
    try:
        target.hardlink_to(source.resolve())
        advance(source.stat().st_size)
    except OSError:  # another disk, another owner, or a file system without links
        copy_file(source, target, advance)


_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_NOT_OF_A_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def system_error(error: BaseException) -> OSError | None:
    """Return the failure of the operating system behind an error of a library that writes files; None without one.

    torch's writer raises RuntimeError in the context of OSError, safetensors quotes the number in its message.
    """
    if isinstance(error, OSError):
        return error
    if quoted := _OS_ERROR.search(str(error)):
        return OSError(int(quoted[1]), os.strerror(int(quoted[1])))
    return None if error.__context__ is None else system_error(error.__context__)


@contextmanager
def writing(path: Path, temporary: Path | None = None) -> Generator[None]:
    """Turn a failure to write `path`, by way of `temporary`, into WriteError, whichever library was writing."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        failure = system_error(error)
        if failure is None or failure.errno is None or failure.errno in _NOT_OF_A_FILE:
            raise
        found = _file_of(failure, path)
        if not (path.is_relative_to(found) or found.is_relative_to(temporary or path)):  # another file, which is read
            raise
        raise WriteError(failure.errno, failure.strerror, str(path)) from error


def _file_of(error: OSError, unknown: Path) -> Path:
    name = error.filename
    return Path(os.fsdecode(name)) if isinstance(name, str | bytes) else unknown


@contextmanager
def naming(key: str, place: Path) -> Generator[None]:
    """Turn a failure to create or write something in `place` into one line that names the key or flag behind it."""
    try:
        yield
    except OSError as error:
        inside, found = place.absolute(), _file_of(error, place).absolute()
        is_inside = found.is_relative_to(inside) or inside.is_relative_to(found)
        if error.errno in DISK_FULL:
            raise WriteError(error.errno, error.strerror, f"{key}: {found}" if is_inside else str(found)) from error
        if error.filename is None or not is_inside:
            raise
        raise UserError(f"{key}: {found} cannot be written ({error.strerror}); name another place") from error


def require_writable(key: str, directory: Path) -> None:
    """Raise UserError naming `key` where `directory` takes no files, or cannot be created; leaves no trace.

    Prints a note where it takes no locks.
    """
    with naming(key, directory), ExitStack() as made:
        for path in (*reversed(directory.parents), directory):
            if not path.is_dir():
                path.mkdir(exist_ok=True)
                made.callback(_remove_if_empty, path)
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            if not lock(file.fileno()):
                note_missing_locks()


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):
        directory.rmdir()


def out_of_files(error: BaseException) -> str | None:
    """Return what to do where `error`, or what caused it, is the limit of open files; None where it is not."""
    for cause in causes(error):
        if isinstance(cause, UserError) and "ulimit" in str(cause):
            return str(cause)
        code = cause.errno if isinstance(cause, OSError) else None
        # safetensors and torch put the system's words into errors of their own
        if code in (errno.EMFILE, errno.ENFILE) or os.strerror(errno.EMFILE) in str(cause):
            return f"too many open files: {_file_limit()}; raise the limit (`ulimit -n 4096`) and run this again"
    return None


def _file_limit() -> str:
    try:
        import resource  # Unix only
    except ImportError:
        return "the system's limit is reached"
    return f"this process may open {resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,} at once"


def free_bytes(path: Path) -> int:
    """Return the free space on the disk of `path`, which need not exist."""
    return shutil.disk_usage(path).free if path.exists() else free_bytes(path.resolve().parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: object) -> None:
    """Write plain `values` as JSON, whole or not at all; numbers that are not finite, which JSON lacks, become null."""
    write_text(path, json.dumps(_finite(values), indent=1, allow_nan=False) + "\n")


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
