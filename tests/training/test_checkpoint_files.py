"""Checkpoints appear whole or not at all, and cost no memory."""

import errno
import io
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from src.errors import TrainingError
from src.reparameterize import main
from src.run_directory import RunDirectory, identify_weights
from src.train import resumed_config, train
from src.training.checkpoints import CheckpointFiles, best_steps, is_full, linked, read_weights, tensor_bytes
from src.training.strategy import StreamingCheckpointIO
from tests.conftest import CONFIGS, small_config
from tests.training.test_lightning_module import ONLY_TRAIN

MEBIBYTE = 2**20


def state(mebibytes: int) -> dict[str, object]:
    quarter = torch.ones(mebibytes * MEBIBYTE // 16)
    return {"state_dict": {"a": quarter, "b": quarter.clone()}, "optimizer_states": [{0: quarter + 1, 1: quarter + 2}]}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    writer = StreamingCheckpointIO()
    written = {**state(1), "step": 7, "text": "none"}
    writer.save_checkpoint(written, tmp_path / "x.ckpt")
    read = writer.load_checkpoint(tmp_path / "x.ckpt")
    assert read["step"] == 7
    assert torch.equal(read["state_dict"]["a"], torch.ones(MEBIBYTE // 16))
    assert torch.equal(read["optimizer_states"][0][1], torch.full((MEBIBYTE // 16,), 3.0))
    assert tensor_bytes(written) == MEBIBYTE
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    files = CheckpointFiles(tmp_path)
    for step in (2, 4):
        StreamingCheckpointIO().save_checkpoint(state(1), files.path(step))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MEBIBYTE, hard))  # to a writer a full disk by another number
    try:
        with pytest.raises(TrainingError) as full:
            StreamingCheckpointIO().save_checkpoint(state(8), files.path(6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for part in (
        "step-00000006.ckpt",
        "8,388,608 bytes",
        "last good checkpoint is step-00000004.ckpt",
        "(step-00000002",
    ):
        assert part in str(full.value)
    assert files.steps() == [2, 4]
    assert torch.equal(StreamingCheckpointIO().load_checkpoint(files.path(4))["state_dict"]["a"][:1], torch.ones(1))
    assert len(list(tmp_path.iterdir())) == 2


class _Broken(io.BytesIO):
    """A file on a device that fails after its first bytes."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, data: Any) -> int:
        if self.tell() > 1024:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(data)


@pytest.mark.parametrize(("number", "full"), [(errno.EIO, False), (errno.ENOSPC, True), (errno.EDQUOT, True)])
def test_a_full_disk_is_told_from_a_broken_one(number: int, full: bool) -> None:
    with pytest.raises(RuntimeError, match=r"unexpected pos|PytorchStreamWriter") as failure:
        torch.save(state(1), _Broken(number))
    assert is_full(failure.value) == full


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    files = CheckpointFiles(tmp_path)
    losses = {2: 3.0, 4: 1.0, 6: 1.0, 8: 2.0, 10: 4.0}
    for step in losses:
        files.path(step).touch()
    files.path(12).mkdir()  # parts of ranks
    (tmp_path / ".step-00000014.ckpt.tmp").mkdir()
    (tmp_path / "..step-00000016.ckpt.tmp.99.tmp").touch()
    files.remove_unfinished()
    assert files.steps() == [2, 4, 6, 8, 10, 12]
    assert len(list(tmp_path.iterdir())) == 6
    assert best_steps(losses, 2) == [4, 6]
    files.prune(losses, keep_last=2, keep_best=1)
    assert files.steps() == [4, 10, 12]
    for step in (10, 12):
        files.link("last", step)
    assert (tmp_path / "last.ckpt").is_dir()
    assert files.newest() == files.path(12)


def without_links(monkeypatch: pytest.MonkeyPatch, kinds: Sequence[str]) -> None:
    """Refuse links as NTFS (symbolic ones, without a privilege) and exFAT (both kinds) do."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    for kind in kinds:
        monkeypatch.setattr(os, kind, refuse)


@pytest.mark.parametrize("kinds", [("symlink",), ("symlink", "link")])
def test_links_work_where_the_file_system_has_none(
    kinds: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_links(monkeypatch, kinds)
    files = CheckpointFiles(tmp_path)
    for step in (2, 4):
        StreamingCheckpointIO().save_checkpoint({"state_dict": {"model.a": torch.tensor(step)}}, files.path(step))
    for step in (2, 4, 4, 2):
        files.link("last", step)
        assert read_weights(tmp_path / "last.ckpt") == {"a": torch.tensor(step)}
    files.path(6).mkdir()  # parts of ranks
    files.link("last", 6)
    assert linked(tmp_path / "last.ckpt") == files.path(6)
    (tmp_path / "last.ckpt").unlink()
    shutil.copytree(files.path(6), tmp_path / "last.ckpt")  # as `cp -rL` makes of a link
    files.link("last", 4)
    assert read_weights(tmp_path / "last.ckpt") == {"a": torch.tensor(4)}
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("kinds", [("symlink",), ("symlink", "link")])
def test_a_run_needs_no_links(
    kinds: Sequence[str], tmp_path: Path, small_overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_links(monkeypatch, kinds)
    best = ("checkpoint.final_weights=best", "checkpoint.every_steps=2", "checkpoint.keep_last=2")
    run = train(small_config(small_overrides, tmp_path, *ONLY_TRAIN, *best, "trainer.max_steps=5")).run_dir
    directory = RunDirectory(run)
    train(resumed_config(directory, None, ["trainer.max_steps=9", "lut.at_fit_end=true"]), directory)
    assert train(resumed_config(directory, None, []), directory).report is None
    for name in ("best", "last"):
        main(["--run", str(run), "--checkpoint", name, "--overwrite", "--lut", f"lut-{name}"])
        assert identify_weights(read_weights(directory.checkpoints_path / f"{name}.ckpt")) == directory.identity()
        assert (run / f"lut-{name}" / "manifest.json").is_file()


@pytest.mark.slow
def test_a_gigabyte_costs_no_memory(tmp_path: Path) -> None:
    """In a process of its own: what an earlier test left in this one's heap would hide what is taken."""
    script = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(CONFIGS.parent)!r})
        from tests.training.test_checkpoint_files import most_memory_while_saving
        print(most_memory_while_saving(1024, Path({str(tmp_path)!r})))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 64 * MEBIBYTE


def most_memory_while_saving(mebibytes: int, directory: Path) -> int:
    """Return by how many bytes resident memory grew at most while a state was saved."""
    StreamingCheckpointIO().save_checkpoint(state(1), directory / "warm.ckpt")
    large, process = state(mebibytes), psutil.Process(os.getpid())
    before, peak, done = process.memory_info().rss, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    StreamingCheckpointIO().save_checkpoint(large, directory / "large.ckpt")
    done.set()
    watcher.join()
    assert (directory / "large.ckpt").stat().st_size >= mebibytes * MEBIBYTE
    (directory / "large.ckpt").unlink()
    return peak - before
