"""`python -m src.reparameterize`: build a lookup table, from a run's weights, one of its checkpoints or its tables."""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from src.cli import add_device_option, add_run_options, find_run, number, parser, run_verb, table_name
from src.data.tokenizer import fingerprint, load_tokenizer
from src.errors import LutError, RunError, caused_by
from src.evaluation.held_out import recorded_token_counts
from src.lut import Manifest, build_lut, read_manifest
from src.lut.builder import Estimate, estimate
from src.lut.codecs import CODECS
from src.lut.manifest import COUNTS_NAME, MANIFEST_NAME
from src.lut.plan import MEMORY_BYTES, plan, recorded_precision
from src.lut.scan import read_token_counts
from src.lut.sources import COMPUTE_DTYPES, RunRows, open_source
from src.run_directory import RunDirectory
from src.system.console import progress_bar, stderr_console
from src.system.files import expand_home, require_writable
from src.training.checkpoints import linked, read_weights

DEFAULT_PRECISION = "bfloat16"


def adopt_checkpoint(run: RunDirectory, checkpoint: str, *, overwrite: bool) -> None:
    """Write a Lightning checkpoint's weights as the run's training form, which an interrupted fit does not have.

    RunError when the checkpoint does not exist, or the run already holds other weights and `overwrite` is off.
    """
    path = linked(run.checkpoints_path / f"{checkpoint}.ckpt" if checkpoint in ("last", "best") else Path(checkpoint))
    if not (path.is_file() or (path / ".metadata").is_file()):
        names = sorted(path.stem for path in run.checkpoints_path.glob("*.ckpt"))
        raise RunError(f"--checkpoint {checkpoint}: no such checkpoint; this run has {', '.join(names) or 'none'}")
    try:
        weights = read_weights(path)
    except (OSError, EOFError, KeyError, RuntimeError, UnpicklingError) as error:
        raise RunError(f"{path}: not a readable checkpoint ({error}); name another, or copy it again") from error
    if run.backbone_path.is_file() and not overwrite:
        if run.identify(weights) != run.identity():
            raise RunError(
                f"{run.backbone_path}: holds other weights than {path.name}; --overwrite replaces them and their tables"
            )
        return
    run.write_weights(weights)


def describe(lut_dir: Path, manifest: Manifest) -> str:
    """Say what a table is."""
    layout, shards = manifest.layout, manifest.shards
    return (
        f"{lut_dir}: {layout.num_rows:,} rows of {layout.row_bytes:,} bytes in {layout.precision}, "
        f"{sum(shard.file_bytes(layout) for shard in shards):,} bytes in {len(shards)} shards"
    )


def describe_estimate(expected: Estimate) -> str:
    """Say what building it will take."""
    disk = "fits" if expected.fits else "does not fit"
    return (
        f"needs {expected.table_bytes / 2**20:,.0f} MiB of disk ({disk}: {expected.free_bytes / 2**20:,.0f} MiB are "
        f"free), {expected.memory_bytes / 2**20:,.0f} MiB of buffers, and about {expected.seconds:,.0f} s on one rank "
        "where the disk keeps up"
    )


def _token_counts(run: RunDirectory) -> Tensor | None:
    """Return the training data's token counts: the run's own, or those of a table, finished or not, that are whole."""
    if (recorded := recorded_token_counts(run)) is not None:
        return recorded
    for path in sorted(run.path.glob(f"*/{COUNTS_NAME}")):
        with suppress(LutError, SafetensorError, KeyError):
            if not (path.parent / MANIFEST_NAME).is_file():
                return load_file(path)["token_counts"]
            if (counts := read_token_counts(path.parent, read_manifest(path.parent))) is not None:
                return torch.from_numpy(counts)
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and build."""
    given = _options(arguments)
    run, console = find_run(given.run, base=given.base), stderr_console()
    if given.dtype is not None:
        with caused_by("--dtype"):
            CODECS[given.dtype].vector_bytes(run.model_config().hidden_size)
    lut_dir, memory_bytes = run.lut_path(given.lut), given.memory_mb * 2**20
    if not given.dry_run:
        require_writable("--lut", lut_dir)
    if given.checkpoint is not None:
        require_writable("--run", run.path)
        with caused_by("--checkpoint"):
            adopt_checkpoint(run, given.checkpoint, overwrite=given.overwrite)
    if given.from_lut is None:
        source, token_counts = RunRows(run, given.compute_dtype, given.device), _token_counts(run)
    else:
        with caused_by("--from-lut"):
            read_manifest(run.lut_path(given.from_lut))  # `open_source` would name a missing run
        source, token_counts = open_source(run.lut_path(given.from_lut)), None
    dtype = given.dtype or (recorded_precision(lut_dir) if given.resume else None) or DEFAULT_PRECISION
    if given.dry_run:
        planned = plan(source, lut_dir, dtype=dtype, memory_bytes=memory_bytes, resume=given.resume)
        for line in (describe(lut_dir, planned.manifest), describe_estimate(estimate(planned))):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    manifest = build_lut(
        source,
        lut_dir,
        dtype=dtype,
        memory_bytes=memory_bytes,
        resume=given.resume,
        overwrite=given.overwrite,
        tokenizer=fingerprint(load_tokenizer(run.tokenizer_path)) if run.tokenizer_path.is_file() else None,
        token_counts=token_counts,
        progress=progress_bar,
    )
    console.print(describe(lut_dir, manifest), markup=False, highlight=False, soft_wrap=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    example = "python -m src.reparameterize --run runs/quickstart --dtype nf4 --lut lut-nf4"
    options = parser("reparameterize", __doc__ or "", example)
    add_run_options(options)
    options.add_argument(
        "--checkpoint", type=expand_home, help="load the weights of this checkpoint first: last, best, or a path"
    )
    options.add_argument(
        "--from-lut", type=table_name, metavar="NAME", help="recode this table of the run; needs no training form"
    )
    options.add_argument(
        "--dtype",
        choices=tuple(CODECS),
        help="precision: "
        + "; ".join(f"{codec.name} ({codec.help})" for codec in CODECS.values())
        + f" (default: {DEFAULT_PRECISION}, or that of what is resumed)",
    )
    options.add_argument(
        "--compute-dtype", choices=tuple(COMPUTE_DTYPES), default="float32", help="what experts compute in (float32)"
    )
    add_device_option(options)
    options.add_argument(
        "--memory-mb",
        type=number(int, 1, 2**40),
        default=MEMORY_BYTES // 2**20,
        help="memory of the buffers (default: %(default)s, or that of what is resumed)",
    )
    options.add_argument("--resume", action="store_true", help="continue an unfinished table")
    options.add_argument("--overwrite", action="store_true", help="replace a table (or weights) that is already there")
    options.add_argument("--dry-run", action="store_true", help="print size, memory and expected time, and stop")
    given = options.parse_args(arguments)
    if given.from_lut is not None and given.checkpoint is not None:
        options.error("--from-lut takes rows from a table, --checkpoint weights: give one of them")
    if given.from_lut is not None and given.device != "cpu":
        options.error(f"--device {given.device}: nothing is computed with --from-lut; leave it out")
    return given


if __name__ == "__main__":
    run_verb(main)
