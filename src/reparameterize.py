"""`python -m src.reparameterize`: build a run's lookup table, from its weights or from one of its checkpoints."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from src.cli import parser, progress_bar, run_verb, stderr_console
from src.data.tokenizer import fingerprint, load_tokenizer
from src.errors import RunError
from src.lut import Manifest, builder
from src.lut.quantization import CODECS
from src.lut.sources import RunRows
from src.run_directory import EXPERTS_PREFIX, RunDirectory, identify

_MODULE_PREFIX = "model."


def adopt_checkpoint(run: RunDirectory, checkpoint: str, *, overwrite: bool) -> None:
    """Write a Lightning checkpoint's weights as the run's training form: how an interrupted fit is put to use.

    RunError when the checkpoint does not exist, or the run already holds other weights and `overwrite` is off.
    """
    path = run.checkpoints_path / f"{checkpoint}.ckpt" if checkpoint in ("last", "best") else Path(checkpoint)
    if not path.is_file():
        raise RunError(f"{path}: no such checkpoint; {_available(run)}")
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
    weights = {name.removeprefix(_MODULE_PREFIX): state[name] for name in state if name.startswith(_MODULE_PREFIX)}
    if run.backbone_path.is_file() and not overwrite:
        experts = {name: weights[name] for name in weights if name.startswith(EXPERTS_PREFIX)}
        found = identify({name: weights[name] for name in weights if name not in experts}, experts)
        if found != run.identity():
            raise RunError(
                f"{run.backbone_path}: holds other weights than {path.name}; --overwrite replaces them and their tables"
            )
        return
    run.write_weights(weights)


def _available(run: RunDirectory) -> str:
    names = sorted(path.stem for path in run.checkpoints_path.glob("*.ckpt"))
    return f"this run has {', '.join(names)}" if names else "this run has none"


def build(run: RunDirectory, lut: str, dtype: str, *, resume: bool, overwrite: bool) -> Manifest:
    """Build the table called `lut` with a progress bar; arguments as in `src.lut.builder`."""
    tokenizer = fingerprint(load_tokenizer(run.tokenizer_path)) if run.tokenizer_path.is_file() else None
    plan = builder.plan(
        RunRows(run), run.lut_path(lut), dtype=dtype, tokenizer=tokenizer, token_counts=_token_counts(run)
    )
    builder.prepare(plan, resume=resume, overwrite=overwrite)
    with progress_bar("building the table (rows)", plan.layout.vocab_size) as advance:
        builder.write_shards(plan, progress=advance)
    return builder.publish(plan)


def _token_counts(run: RunDirectory) -> Tensor | None:
    """Take over the training data's token counts from a table that has them."""
    files = sorted(run.path.glob(f"*/{builder.COUNTS_NAME}"))
    return load_file(files[0])["token_counts"] if files else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and build."""
    options = parser(
        "reparameterize",
        __doc__ or "",
        "python -m src.reparameterize --run runs/quickstart --lut lut-bf16",
    )
    options.add_argument("--run", type=Path, required=True, help="run directory, such as runs/quickstart")
    options.add_argument("--checkpoint", help="take the weights of this checkpoint first: last, best, or a path")
    options.add_argument("--dtype", choices=tuple(CODECS), default="bfloat16", help="precision (default: bfloat16)")
    options.add_argument("--lut", default="lut", help="name of the table inside the run (default: lut)")
    options.add_argument("--resume", action="store_true", help="go on with an unfinished table")
    options.add_argument("--overwrite", action="store_true", help="replace a table (or weights) that is already there")
    given = options.parse_args(arguments)
    run = RunDirectory(given.run).require()
    if given.checkpoint is not None:
        adopt_checkpoint(run, given.checkpoint, overwrite=given.overwrite)
    manifest = build(run, given.lut, given.dtype, resume=given.resume, overwrite=given.overwrite)
    layout = manifest.layout
    stderr_console().print(
        f"{run.lut_path(given.lut)}: {layout.vocab_size:,} rows of {layout.row_bytes:,} bytes in {layout.precision}, "
        f"{layout.table_bytes:,} bytes in {len(manifest.shards)} shards"
    )


if __name__ == "__main__":
    run_verb(main)
