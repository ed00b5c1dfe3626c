"""Errors that users can cause. Each message says where, what was found, what was expected, what to do.

Verbs catch `UserError`, print the message and exit with its code: 2 for a mistake in what was given, 1 for what failed
on the way. Anything else is a bug and keeps its traceback.
"""

import errno
import math
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager

MAX_FLOAT32 = 3.4e38
"""What models compute in has no larger numbers."""


def one_line(text: str) -> str:
    """Return a message as one printable line: what it quotes may hold line ends and bytes that are no text."""
    joined = re.sub(r"\s*[\r\n]+\s*", " ", text.strip())
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in joined)


class UserError(ValueError):
    """A mistake in the user's input; the message alone, always one line, must be enough to correct it."""

    def __str__(self) -> str:
        return one_line(super().__str__())

    exit_code = 2


DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Numbers of system errors: no space left on the disk, in the quota, or in what one file may take."""


class WriteError(OSError, UserError):
    """A file that cannot be written: its disk is full, or the file system does not let us; `errno` says which."""

    exit_code = 1

    def __str__(self) -> str:
        remedy = "free some space on its disk" if self.errno in DISK_FULL else "make it writable"
        return f"{self.filename}: cannot be written ({self.strerror}); {remedy}, and run this again"


class ConfigError(UserError):
    """A config file, key or value that cannot be used."""


class DataError(UserError):
    """A corpus or tokenizer that cannot be read or does not fit the model."""


class RunError(UserError):
    """A run directory that is missing, incomplete or does not match its own records."""


class LutError(UserError):
    """A lookup table that cannot be built or opened."""


class LutWriteError(LutError):
    """A lookup table that cannot be written: its disk is full, or the file system does not let us."""

    exit_code = 1


class LutFormatError(LutError):
    """A lookup table on disk that is unfinished, damaged or of another format version."""


class LutMismatchError(LutError):
    """A complete lookup table that belongs to another model."""


class TrainingError(UserError):
    """Training that cannot continue: numbers that are not finite, a full disk."""

    exit_code = 1


class CheckpointError(UserError):
    """A checkpoint of the authors' code that cannot be read, or a run that cannot be written as one."""


@contextmanager
def caused_by(setting: str, path: object = "") -> Generator[None]:
    """Put the flag or key whose value it is about in front of a UserError that starts with `path`, if not named yet."""
    try:
        yield
    except UserError as error:
        if setting in str(error) or not str(error).startswith(one_line(str(path))):
            raise
        raise type(error)(f"{setting}: {error}") from error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what caused it, what caused that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def check_range(
    config: object,
    section: str,
    names: Iterable[str],
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> None:
    """Raise ConfigError for the first of `names` whose value in `config` is out of range or not finite; None passes."""
    limits = {"at least": at_least, "above": above, "below": below, "at most": at_most}
    stated = " and ".join(f"{words} {limit}" for words, limit in limits.items() if math.isfinite(limit))
    for name in names:
        value = getattr(config, name)
        if isinstance(value, float) and MAX_FLOAT32 < abs(value) < math.inf:
            raise ConfigError(f"{section}{name}: {value}, but it must be at most {MAX_FLOAT32}, as float32 allows")
        if value is not None and not (at_least <= value <= at_most and above < value < below):
            raise ConfigError(f"{section}{name}: {value}, but it must be {stated}")
