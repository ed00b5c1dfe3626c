"""`python -m src.convert`: read Hugging Face checkpoints into runs, and write runs back."""

from argparse import Namespace
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from src.cli import number, parser, run_verb, table_name
from src.errors import caused_by
from src.interop import FAMILIES
from src.system.console import progress_bar, stderr_console
from src.system.files import naming, require_writable


@contextmanager
def _blaming_flags(given: Namespace) -> Generator[None]:
    require_writable("--output", given.output.parent)
    with (
        naming("--output", given.output),
        caused_by("--input", given.input),
        caused_by("--tokenizer", given.tokenizer),
    ):
        yield


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and convert."""
    options = parser(
        "convert",
        "\n".join([__doc__ or "", "", "families:", *(f"  {each.name}: {each.help}" for each in FAMILIES.values())]),
        "python -m src.convert --from official --input MoLE-160M-4E --output runs/mole-160m",
    )
    exports = {name: family.export_checkpoint for name, family in FAMILIES.items() if family.export_checkpoint}
    direction = options.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", dest="source", choices=tuple(FAMILIES), help="read a checkpoint into a new run")
    direction.add_argument("--to", dest="target", choices=tuple(exports), help="write a run as a checkpoint")
    options.add_argument("--input", type=Path, required=True, metavar="DIR", help="checkpoint, or run with --to")
    options.add_argument("--output", type=Path, required=True, metavar="DIR", help="new directory; must not exist")
    options.add_argument(
        "--top-k", type=number(int, 1), help="experts per token of an MoE, which its config lacks (default: 2)"
    )
    options.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json (default: the checkpoint's)")
    options.add_argument(
        "--lut",
        type=table_name,
        default="lut",
        help="with --to: table of a run that has no training form (default: lut)",
    )
    given = options.parse_args(arguments)
    if given.target is not None:
        if given.top_k is not None or given.tokenizer is not None:
            options.error("--top-k and --tokenizer belong to --from; a run knows both")
        with _blaming_flags(given):
            exports[given.target](given.input, given.output, lut=given.lut, progress=progress_bar)
    else:
        top_k = 2 if given.top_k is None else given.top_k
        convert = FAMILIES[given.source].import_checkpoint
        with _blaming_flags(given):
            convert(given.input, given.output, top_k=top_k, tokenizer=given.tokenizer, progress=progress_bar)
    stderr_console().print(f"{given.input} -> {given.output}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_verb(main)
