"""`python -m src.export`: write a run as a folder that other programs open, such as transformers.

`convert --to` is the same under an older name, next to `convert --from`.
"""

from collections.abc import Sequence
from pathlib import Path

from src.cli import add_run_options, find_run, parser, run_verb
from src.errors import caused_by
from src.interop import FAMILIES
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
    given = options.parse_args(arguments)
    run = find_run(given.run)
    require_writable("--output", given.output.parent)
    with (
        naming("--output", given.output),
        caused_by("--output", given.output),
        caused_by("--lut", run.lut_path(given.lut)),
        caused_by("--run", run.path),
    ):
        exports[given.to](run.path, given.output, lut=given.lut, progress=progress_bar)
    stderr_console().print(f"{run.path} -> {given.output}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_verb(main)
