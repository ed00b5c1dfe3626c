"""What the verbs share on the command line: parsers, common options, and one line for a user's mistake."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from src.errors import ConfigError, RunError, UserError, caused_by, one_line
from src.run_directory import RunDirectory
from src.system.files import expand_home, out_of_files, require_writable
from src.system.ranks import leave
from src.system.signals import StopSignals


def run_verb(main: Callable[[], None]) -> None:
    """Run a verb; a `UserError` becomes one line on stderr and its exit code, a closed pipe ends it silently.

    Ctrl-C ends it with 130 after it has cleaned up, a second one at once.
    """
    signals = StopSignals([signal.SIGINT])

    def listening() -> None:
        signals.listen()
        main()

    try:
        _run(listening)
    except BaseException as error:
        if not signals.received and not isinstance(error, KeyboardInterrupt):
            raise
        with suppress(OSError):
            print("interrupted", file=sys.stderr)
        if signals.received and signals.owns_process:
            leave(128 + signal.SIGINT)  # everything is closed, and the interpreter would wait for threads
        sys.exit(128 + signal.SIGINT)
    finally:
        signals.restore()


def _run(main: Callable[[], None]) -> None:
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # a closed pipe raises here, not while the interpreter shuts down
    except BrokenPipeError:
        try:
            os.write(sys.stdout.fileno(), b"\n")
        except BrokenPipeError:  # so it is the reader of our text that is gone, as in `generate | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)  # 128 + SIGPIPE
        raise
    except Exception as error:
        message = out_of_files(error) or (str(error) if isinstance(error, UserError) else None)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, UserError) else 2)


def require_text(name: str, text: str) -> str:
    """Return a text from the command line or standard input; UserError when its bytes were not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = text.encode("utf-8", "backslashreplace").decode()
        raise UserError(
            f"{name}: {shown[:80]!r} is not UTF-8 text; convert it, or check the terminal's locale"
        ) from error
    return text


def number(kind: type[int] | type[float], at_least: float, at_most: float = 2**63 - 1) -> Callable[[str], int | float]:
    """Return the type of an option that is a number in a range; what is not finite is in none."""

    def read(text: str) -> int | float:
        with suppress(ValueError):
            if at_least <= (value := kind(text)) <= at_most:
                return value
        name = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text[:80]!r}, but it must be a {name} from {at_least} to {at_most}")

    return read


def output_file(text: str) -> Path:
    """Read an option that names a file to write; it is refused, before any work, where none can be written."""
    path = _path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text[:80]!r} cannot be written (Is a directory); name another file")
    return output_directory(str(path.parent)) / path.name


def output_directory(text: str) -> Path:
    """Read an option that names a directory to write into, which need not exist; refused where that is impossible."""
    path = _path(text)
    try:
        require_writable(repr(text[:80]), path)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def input_file(text: str) -> Path:
    """Read an option that names a file to read."""
    path = _path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no file; give the path of one")
    return path


def table_name(text: str) -> str:
    """Read an option that names a table of a run, a directory inside it."""
    if not _path(text).name or ".." in Path(text).parts:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} names no table; give a name such as lut-nf4")
    return text


def find_plug_in(path: Path | None, run: RunDirectory) -> RunDirectory | None:
    """Return the plug-in for `run` that `--attach` names; RunError where it is none, or one for another run."""
    if path is None:
        return None
    with caused_by("--attach"):
        plug_in = RunDirectory(path).require()
        plug_in.require_base(run.path, run.identity())
    return plug_in


def find_config(path: Path) -> Path:
    """Return what `--config` names; ConfigError where it is no file."""
    if not path.is_file():
        raise ConfigError(f"--config: {path}: no such config file; see configs/ for the existing ones")
    return path


def find_run(path: Path, option: str = "--run", base: Path | None = None) -> RunDirectory:
    """Return the run directory that an option names, which may plug into `base`; RunError where it is none."""
    with caused_by(option):
        run = RunDirectory(path, base).require()
    if base is not None and run.plug_in() is None:
        raise RunError(f"--base {base}: {path} holds all of its weights and plugs into no other run; leave --base out")
    run.base()
    return run


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of `run_verb`."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message)}\n")  # without the usage, which is many lines: `--help` shows it


def parser(verb: str, description: str, example: str) -> argparse.ArgumentParser:
    """Return a parser whose help ends with an example; `~` in its paths is the home directory."""
    options = _Parser(
        prog=f"python -m src.{verb}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.register("type", Path, _path)
    options.register("type", expand_home, _path_text)
    return options


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' is no path")
    try:
        return Path(expand_home(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _path_text(text: str) -> str:
    return str(_path(text))


def add_run_options(options: argparse.ArgumentParser) -> None:
    """Add `--run`, `--base` and `--lut`."""
    options.add_argument("--run", type=Path, required=True, help="run directory, such as runs/quickstart")
    options.add_argument(
        "--base", type=Path, metavar="RUN", help="the run that --run plugs into (default: where it was in training)"
    )
    options.add_argument(
        "--lut", type=table_name, default="lut", help="name of the table inside the run (default: lut)"
    )


def add_form_options(options: argparse.ArgumentParser) -> None:
    """Add the options of verbs that load a model: run, table, form, reader and device."""
    add_run_options(options)
    options.add_argument("--attach", type=Path, metavar="RUN", help="plug-in that was trained on --run, added to it")
    options.add_argument(
        "--experts",
        choices=("auto", "lut", "ffn"),
        default="auto",
        help="lut reads rows from the table, ffn computes them, auto prefers a finished table (default)",
    )
    add_reader_option(options)
    add_device_option(options)


def add_device_option(options: argparse.ArgumentParser, default: str = "cpu") -> None:
    """Add `--device`, which is tried before any work."""
    options.add_argument(
        "--device", type=_device, default=default, help=f"where the model computes (default: {default})"
    )


def _device(text: str) -> str:
    import torch

    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0][:120]
        raise argparse.ArgumentTypeError(f"{text[:80]!r} cannot be used ({reason}); take cpu or cuda") from error
    return text


def add_reader_option(options: argparse.ArgumentParser) -> None:
    """Add `--reader`, which takes the name of any registered reader."""
    from src.lut.readers import READERS  # imports torch, which not every verb needs before it parses

    kinds = ", ".join(f"{name} ({kind.help})" for name, kind in READERS.items())
    options.add_argument(
        "--reader", choices=tuple(READERS), default="auto", help=f"how the table is read (default: auto): {kinds}"
    )
