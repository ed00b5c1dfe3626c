"""`python -m src.study`: run the cells of a study, arms by seeds, and keep one table and one page of what they show."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from src.cli import number, parser, run_verb
from src.errors import caused_by
from src.studies.cells import Choice, require_known, runs_root
from src.studies.definition import PLACES, Study, load_study
from src.studies.figures import draw_figures
from src.studies.page import page_text
from src.studies.plan import print_plan
from src.studies.rows import read_rows
from src.studies.runner import Runner
from src.studies.summary import Summary
from src.system.console import stderr_console
from src.system.files import write_text
from src.system.hardware import usable_cores
from src.system.signals import STOP_SIGNALS


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run; exit code 1 when a cell failed."""
    example = "python -m src.study --study configs/studies/family-code/study.yaml --jobs 2"
    options = parser("study", __doc__ or "", example)
    options.add_argument(
        "--study", type=Path, required=True, help="definition, such as configs/studies/NAME/study.yaml"
    )
    options.add_argument("--arms", type=_names, metavar="A,B", help="only these arms")
    options.add_argument("--seeds", type=_seeds, metavar="0,1", help="only these seeds")
    options.add_argument("--jobs", type=number(int, 1, 1024), default=1, help="cells at a time, which share the cores")
    options.add_argument("--dry-run", action="store_true", help="list the cells and what they cost, and stop")
    options.add_argument("--report", action="store_true", help="write the page from results.csv alone, and stop")
    options.add_argument("--rerun", action="store_true", help="run the chosen cells again, replacing their results")
    options.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a config key in all cells; corpus=DIR and base=RUN name a folder of text, a run to start from",
    )
    given = options.parse_args(arguments)
    with caused_by("--study", given.study):
        study = load_study(given.study)
    pairs = [text.partition("=") for text in given.overrides]
    places = {name: str(Path(path).expanduser().absolute()) for name, _, path in pairs if name in PLACES}
    overrides = ["".join(pair) for pair in pairs if pair[0] not in PLACES]
    choice = Choice(arms=given.arms, seeds=given.seeds, overrides=overrides, places=places)
    require_known(study, choice)
    if study.search is not None and any(text.startswith(f"{study.search.key}=") for text in choice.overrides):
        study = replace(study, search=None)
    if given.dry_run:
        torch.set_num_threads(max(1, usable_cores() // given.jobs))
        print_plan(study, choice, given.jobs, Console())
        return
    if given.report:
        report(study)
        return
    root = runs_root(study, choice)
    runner = Runner(study=study, choice=choice, root=root, jobs=given.jobs, rerun=given.rerun, tell=_tell)
    runner.run()
    report(study)
    if runner.failures:
        for name, reason in runner.failures.items():
            _tell(f"no result: {name}: {reason}")
        sys.exit(1)


def report(study: Study) -> None:
    """Write the page and its plots from `results.csv`."""
    summary = Summary(study, read_rows(study.results_path))
    if summary.arms:
        draw_figures(summary, study.path.parent)
    write_text(study.page_path, page_text(summary))
    _tell(f"{study.page_path}: written from {len(summary.rows)} results")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",") if seed]


def _tell(text: str) -> None:
    stderr_console().print(text, markup=False, highlight=False, soft_wrap=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for stop in STOP_SIGNALS:
        signal.signal(stop, _interrupt)
    run_verb(main)
