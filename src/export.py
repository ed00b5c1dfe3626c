"""`python -m src.export`: write a run as a folder that other programs open, such as transformers.

`convert --to` is the same under an older name, next to `convert --from`.
"""

from collections.abc import Sequence
from pathlib import Path

from src.cli import add_run_options, find_run, parser, run_verb
from src.errors import UserError, caused_by
from src.interop import FAMILIES
from src.run_directory import RunDirectory
from src.system.console import progress_bar, stderr_console
from src.system.files import naming, require_writable


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write."""
    exports = {name: family.export_checkpoint for name, family in FAMILIES.items() if family.export_checkpoint}
    options = parser(
        "export",
        "\n".join([__doc__ or "", "families:", *(f"  {name}: {FAMILIES[name].help}" for name in exports)]),
        "python -m src.export --run runs/quickstart --to hf --output exported/quickstart",
    )
    add_run_options(options)
    options.add_argument("--to", choices=tuple(exports), required=True, help="what to write")
    options.add_argument("--output", type=Path, required=True, metavar="DIR", help="new directory; must not exist")
    options.add_argument(
        "--plug-in-only", action="store_true", help="write a plug-in without its base, of which only the name is kept"
    )
    given = options.parse_args(arguments)
    export = FAMILIES[given.to].export_plug_in if given.plug_in_only else exports[given.to]
    if export is None:
        raise UserError(f"--plug-in-only: {given.to} has no such checkpoints; take --to hf, or leave it out")
    run = RunDirectory(given.run) if given.plug_in_only else find_run(given.run, base=given.base)
    require_writable("--output", given.output.parent)
    with (
        naming("--output", given.output),
        caused_by("--output", given.output),
        caused_by("--lut", run.lut_path(given.lut)),
        caused_by("--run", run.path),
    ):
        export(run if given.base else run.path, given.output, lut=given.lut, progress=progress_bar)
    stderr_console().print(f"{run.path} -> {given.output}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_verb(main)
