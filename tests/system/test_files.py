"""Files appear whole, with the permissions that any new file gets, or one error says why they do not."""

import os
import resource
from collections.abc import Callable, Generator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from matplotlib.figure import Figure

from src.cli import run_verb
from src.errors import WriteError
from src.run_directory import write_tensors
from src.system.files import atomic_directory, atomic_path, write_json, write_text


@pytest.fixture
def umask() -> Generator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_permissions_are_those_of_any_new_file_without_a_change_of_the_umask(
    umask: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    change = Mock(wraps=os.umask)
    with monkeypatch.context() as patch:  # the umask is the whole process's: another thread's new file would get it
        patch.setattr(os, "umask", change)
        with atomic_path(tmp_path / "new") as temporary:
            temporary.unlink(missing_ok=True)
            temporary.touch(mode=0o600)  # as some writers create theirs
    change.assert_not_called()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~umask


def write_figure(path: Path) -> None:
    with atomic_path(path) as temporary:
        Figure().savefig(temporary, format="png")


def write_folder(path: Path) -> None:
    with atomic_directory(path) as directory:
        (directory / "rows.bin").write_bytes(bytes(100_000))


def write_checkpoint(path: Path) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        torch.save(torch.ones(100_000), handle)


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_text(path, "text" * 10_000),
    "json": lambda path: write_json(path, list(range(10_000))),
    "safetensors": lambda path: write_tensors(path, {"a": torch.ones(100_000)}, {}),
    "figure": write_figure,
    "folder": write_folder,
    "checkpoint": write_checkpoint,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_cannot_be_written_is_one_line_with_exit_code_1_whatever_writes_it(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, (soft, hard) = tmp_path / kind, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # to a writer a full disk by another number
    try:
        with pytest.raises(SystemExit) as ended:
            run_verb(lambda: WRITERS[kind](target))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.value.code == 1
    advice = "free some space on its disk, and run this again"
    assert capsys.readouterr().err == f"error: {target}: cannot be written (File too large); {advice}\n"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=rf"^{tmp_path}/file/{kind}: cannot be written \(.*\); make it writable"):
        WRITERS[kind](tmp_path / "file" / kind)


def test_other_errors_inside_a_write_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "new"):
        (tmp_path / "source").read_bytes()
    with pytest.raises(RuntimeError, match="of another kind"), atomic_directory(tmp_path / "new"):
        raise RuntimeError("of another kind")
    assert list(tmp_path.iterdir()) == []
