"""Files appear whole, with the permissions that any new file gets."""

import os
from collections.abc import Generator
from pathlib import Path
from unittest.mock import Mock

import pytest

from src.system.files import atomic_path


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
