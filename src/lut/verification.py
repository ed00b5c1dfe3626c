"""Proves that a table on disk is what was written: every byte of every file, against what the manifest says.

Reading a row checks that row; this checks them all, and names everything that is wrong instead of the first thing.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from src.errors import LutError
from src.lut.layout import Shard, plan_shards
from src.lut.manifest import COUNTS_NAME, MANIFEST_NAME, Manifest, ShardRecord, read_manifest
from src.lut.opening import check_shard, read_token_counts
from src.lut.row_errors import ERRORS_NAME, read_row_errors
from src.lut.scan import TableScan

Progress = Callable[[int], None]
"""Called with the number of rows that were just checked."""
_RUN_BYTES = 4 * 2**20


def verify_table(lut_dir: Path, progress: Progress | None = None) -> list[str]:
    """Read a whole table and return its problems, each naming the file and, for a row, the token id; [] when sound.

    A table whose manifest cannot be trusted has that one problem, for nothing says what else to expect.
    """
    try:
        manifest = read_manifest(lut_dir)
    except LutError as error:
        return [str(error)]
    report = progress or _silent
    problems = list(_companion_problems(lut_dir, manifest))
    for record, shard in zip(manifest.shards, plan_shards(manifest.layout), strict=True):
        problems += _shard_problems(lut_dir, manifest, record, shard, report)
    return problems


def _companion_problems(lut_dir: Path, manifest: Manifest) -> Iterator[str]:
    checks: tuple[Callable[[], object], ...] = (
        lambda: read_token_counts(lut_dir, manifest),
        lambda: read_row_errors(lut_dir),
    )
    for check in checks:
        try:
            check()
        except LutError as error:
            yield str(error)
    expected = {MANIFEST_NAME, ERRORS_NAME, *(record.file for record in manifest.shards)}
    if manifest.token_counts_sha256 is not None:
        expected.add(COUNTS_NAME)
    for path in sorted(lut_dir.iterdir()):
        if path.name not in expected:
            yield f"{path}: is no part of this table; remove it, or find out what left it there"


def _shard_problems(
    lut_dir: Path, manifest: Manifest, record: ShardRecord, shard: Shard, report: Progress
) -> Iterator[str]:
    try:
        check_shard(lut_dir, record)
    except LutError as error:
        yield str(error)
        report(shard.num_tokens)
        return
    scan, step = TableScan(lut_dir, manifest.layout), max(1, _RUN_BYTES // manifest.row_bytes)
    for row in range(0, shard.num_tokens, step):
        count = min(step, shard.num_tokens - row)
        damaged = scan.damaged(shard.first_token + row, count)
        yield from (f"{lut_dir / record.file}: {problem}" for problem in damaged)
        report(count)


def _silent(_: int) -> None:
    """Report progress to nobody."""
