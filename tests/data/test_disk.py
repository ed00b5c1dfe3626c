"""A disk that fails while a corpus is prepared: one line, and the next call completes it with the same bytes."""

import errno
import os
import random
import sys
from functools import partial
from pathlib import Path

import pytest

from src import prepare_data
from src.cli import run_verb
from tests.conftest import CONFIGS
from tests.data.corpora import sentences, write_as
from tests.distributed.processes import start
from tests.system.failing_disk import at_write, fail_from_now_on, needs_seccomp

pytestmark = needs_seccomp


def prepare(cache: Path, arguments: list[str], number: int, code: int) -> tuple[int | None, str]:
    """Prepare in a process whose disk fails at the `number`-th write; 0 counts them, as exit code beyond 2."""

    def verb() -> None:
        sys.stderr = os.fdopen(2, "w", buffering=1)
        count = at_write(number, cache, "", partial(fail_from_now_on, code))
        run_verb(partial(prepare_data.main, arguments))
        if not number:
            sys.exit(count())

    log = cache.with_suffix(".log")
    process = start(verb, log)
    process.join(60)
    return process.exitcode, log.read_text()


@pytest.mark.parametrize(("code", "exit_code"), [(errno.ENOSPC, 1), (errno.EROFS, 2)])
def test_the_next_call_completes_what_a_failing_disk_cut_short(
    code: int, exit_code: int, tmp_path: Path, attacks: int
) -> None:
    text = write_as("text.jsonl", tmp_path, sentences(300))

    def arguments(cache: Path) -> list[str]:
        mine = [f"data.files=[{text}]", f"data.cache_dir={cache}", "data.prepare_processes=1", "data.shard_mb=1"]
        size = ["data.tokenizer.vocab_size=512", "model.vocab_size=512"]
        return ["--config", str(CONFIGS / "quickstart.yaml"), *mine, *size, "data.sequence_length=32"]

    writes, _ = prepare(tmp_path / "count", arguments(tmp_path / "count"), 0, 0)
    assert writes is not None and writes > 8
    expected = contents(tmp_path / "count")
    for number in random.Random(code).sample(range(2, writes), attacks):
        cache = tmp_path / str(number)
        found, told = prepare(cache, arguments(cache), number, code)
        errors = [line for line in told.splitlines() if line.startswith("error: ")]
        assert found == exit_code and len(errors) == 1 and "Traceback" not in told, told
        assert errors[0].startswith(f"error: data.cache_dir: {cache}")
        assert f"cannot be written ({os.strerror(code)})" in errors[0]
        assert prepare(cache, arguments(cache), -1, code)[0] == 0
        assert contents(cache) == expected


def contents(cache: Path) -> dict[str, bytes]:
    """Every file of a cache but its locks."""
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }
