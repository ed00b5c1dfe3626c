"""`python -m src.verify`: prove that a run's table is intact and gives the answers of its training form."""

import sys
from collections.abc import Sequence

from rich.console import Console

from src.cli import add_device_option, add_run_options, find_run, output_file, parser, run_verb
from src.config import load_run_config
from src.errors import caused_by
from src.evaluation.equivalence import plot_costs
from src.evaluation.held_out import held_out_of_run
from src.evaluation.proof import Check, prove
from src.lut import read_manifest
from src.system.console import print_note, progress_bar, text_table
from src.system.files import atomic_path, write_json


def print_checks(checks: Sequence[Check], title: str, console: Console) -> None:
    """Print the checks as a table."""
    headings = ("", "check", "found", "expected")
    table = text_table(title, *headings, texts=headings)
    marks = {True: "[green]ok[/]", False: "[bold red]FAILS[/]", None: "[dim]-[/]"}
    for check in checks:
        table.add_row(marks[check.holds], check.name, check.found, check.expected)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and check; exit code 1 when a check fails."""
    options = parser("verify", __doc__ or "", "python -m src.verify --run runs/quickstart")
    add_run_options(options)
    add_device_option(options)
    options.add_argument("--json", type=output_file, metavar="FILE", help="also write every figure as JSON")
    options.add_argument(
        "--plot", type=output_file, metavar="FILE", help="also draw bytes per token against loss into a PNG"
    )
    given = options.parse_args(arguments)
    run = find_run(given.run, base=given.base)
    with caused_by("--lut"):
        read_manifest(run.lut_path(given.lut))
    text, note = held_out_of_run(run, load_run_config(run).data)
    print_note(note)
    checks = list(prove(run, text, lut=given.lut, device=given.device, progress=progress_bar))
    print_checks(checks, f"{run.path} / {given.lut}", Console())
    if given.json is not None:
        write_json(given.json, [check.to_dict() for check in checks])
    costs = [check.cost for check in checks if check.cost is not None]
    if given.plot is not None and costs:
        with atomic_path(given.plot) as temporary:
            plot_costs(costs, f"{run.path.name}: what a table's precision costs", temporary)
    if any(check.holds is False for check in checks):
        sys.exit(1)


if __name__ == "__main__":
    run_verb(main)
