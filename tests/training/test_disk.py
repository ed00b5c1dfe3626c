"""A disk that fails while a run writes: one clear error, the newest checkpoint stays whole, and `--resume` goes on."""

import errno
import os
import random
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from src.cli import run_verb
from src.train import main, train
from src.training.checkpoints import CheckpointFiles, read_weights
from tests.conftest import small_config
from tests.distributed.processes import start
from tests.system.failing_disk import at_write, fail_from_now_on, needs_seccomp
from tests.training.test_lightning_module import ONLY_TRAIN
from tests.training.test_preemption import results
from tests.training.test_resume import SMALLER, logged, resume

RUN = (
    *ONLY_TRAIN,
    *SMALLER,
    "trainer.max_steps=6",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=2",
    "lut.at_fit_end=true",
    "lut.chunk_tokens=128",
    "evaluation.at_fit_end=true",
    "evaluation.dashboard=true",
)

pytestmark = needs_seccomp


def verb(arguments: Sequence[str], number: int, place: Path, name: str, code: int, count_to: Path) -> None:
    """Run `src.train` as a process would, on a disk that fails at the `number`-th write of `name` (0: never)."""
    sys.stderr = os.fdopen(2, "w", buffering=1)  # a stream that stays writable
    count = at_write(number, place, name, partial(fail_from_now_on, code))
    try:
        run_verb(partial(main, arguments))
    finally:
        if not number:
            count_to.write_text(str(count()))


def run(folder: Path, *arguments: str, number: int = 0, name: str = "", code: int = 0) -> tuple[int | None, str]:
    """Return the exit code and what was told on stderr."""
    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    target = partial(verb, arguments, number, folder, name, code, folder.with_suffix(".count"))
    process = start(target, log)
    process.join(90)
    if process.exitcode is None:
        process.kill()
    return process.exitcode, log.read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_overrides: Sequence[str]) -> Path:
    """A run that nothing disturbed; treat its directory as read-only."""
    return train(small_config(small_overrides, tmp_path_factory.mktemp("whole"), *RUN)).run_dir


def check_failure(folder: Path, whole: Path, overrides: Sequence[str], number: int, name: str, code: int) -> None:
    """Let a disk fail, and see that the error is right and that nothing is lost."""
    arguments = [*overrides, *RUN, f"output_dir={folder}"]
    exit_code, told = run(folder, *arguments, number=number, name=name, code=code)
    assert exit_code == 1, told
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in told, told
    assert os.strerror(code) in errors[0]
    part = folder / whole.name
    files = CheckpointFiles(part / "checkpoints")
    if (newest := files.newest()) is None:
        assert "good checkpoint is" not in errors[0]
        return
    assert f"the last good checkpoint is {newest.name} (step {files.step(newest)}) and is complete" in errors[0]
    full = code in (errno.ENOSPC, errno.EDQUOT)
    assert re.search("free .*space" if full else f"make {re.escape(str(part))} writable", errors[0])
    assert f"continue with --resume {part}" in errors[0]
    assert read_weights(newest)
    resume(part)
    (table, record), (expected_table, expected_record) = results(part), results(whole)
    assert table == expected_table
    assert {key: value for key, value in record.items() if value != expected_record[key]} == {}, errors[0]
    assert record.keys() == expected_record.keys()
    assert logged(part)["val/loss"] == logged(whole)["val/loss"]
    lost = {files.step(newest) - 1}  # of the checkpoint's own step, whose row is written after it
    losses, expected = logged(part)["train/loss"], logged(whole)["train/loss"]
    assert {**expected, **losses} == expected and expected.keys() - losses.keys() <= lost
    if code == errno.ENOSPC:  # a disk that takes no change at all keeps an unfinished file
        assert not list(part.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [
        (9, "ckpt", errno.ENOSPC),
        (2, "last.ckpt", errno.EROFS),
        (5, "metrics.csv", errno.ENOSPC),
        (1, "backbone.safetensors", errno.ENOSPC),
        (2, "lut/rows-", errno.EROFS),
    ],
)
def test_a_disk_that_fails_ends_a_run_in_one_line_and_resuming_completes_it(
    number: int, name: str, code: int, tmp_path: Path, small_overrides: Sequence[str], whole: Path
) -> None:
    check_failure(tmp_path / "run", whole, small_overrides, number, name, code)


@pytest.fixture(scope="module")
def writes(tmp_path_factory: pytest.TempPathFactory, small_overrides: Sequence[str]) -> int:
    """How often a whole run writes."""
    folder = tmp_path_factory.mktemp("count") / "run"
    arguments = [*small_overrides, *RUN, f"output_dir={folder}"]
    assert run(folder, *arguments) == (0, folder.with_suffix(".log").read_text())
    return int(folder.with_suffix(".count").read_text())


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_at_random_writes_a_disk_fails_and_resuming_completes_the_run(
    code: int, tmp_path: Path, small_overrides: Sequence[str], whole: Path, writes: int, attacks: int
) -> None:
    assert writes > 60
    for number in random.Random(code).sample(range(2, writes), attacks):
        check_failure(tmp_path / str(number), whole, small_overrides, number, "", code)


WRITTEN = {
    "config.yaml": 1,
    "held_out.safetensors": 1,
    "report.json": 2,
    "metrics.csv": 1,
    "best.ckpt": 2,
    "figures/": 1,
    "experts.safetensors": 1,
    "lut/": 4,
    "manifest.json": 1,
    "scores.json": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_each_file_of_a_run_may_be_the_one_that_cannot_be_written(
    name: str, code: int, tmp_path: Path, small_overrides: Sequence[str], whole: Path
) -> None:
    check_failure(tmp_path / "run", whole, small_overrides, WRITTEN[name], name, code)
