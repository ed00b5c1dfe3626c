"""`python -m src.evaluate`: score a run on text and tasks, in either form, or compare two models in pairs."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from rich.console import Console

from src.cli import add_form_options, find_plug_in, find_run, number, output_file, parser, run_verb
from src.config import load_run_config
from src.data.files import expand_files
from src.data.tokenizer import fingerprint, load_tokenizer
from src.errors import ConfigError, caused_by
from src.evaluation.comparison import compare, print_comparison, print_evaluation
from src.evaluation.config import EvaluationConfig
from src.evaluation.held_out import EvaluationCorpus, held_out_of_run
from src.evaluation.perplexity import zlib_bits_per_byte
from src.evaluation.results import Evaluation
from src.evaluation.suite import Suite, evaluate_model, prepare_suite
from src.evaluation.tasks import describe_tasks
from src.inference import load_model
from src.inference.disk_experts import DiskExperts
from src.inference.loader import ExpertForm, require_table
from src.lut.manifest import MANIFEST_NAME
from src.run_directory import RunDirectory
from src.system.console import print_note, progress_bar
from src.system.files import expand_home, write_json


@dataclass(frozen=True)
class Candidate:
    """A model to score: a run, a form of it, a table."""

    run: RunDirectory
    experts: ExpertForm
    lut: str
    attached: RunDirectory | None = None
    """A plug-in that is added to `run`."""

    @property
    def owner(self) -> RunDirectory:
        """The run that has the experts, in either form."""
        return self.attached or self.run


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and evaluate."""
    given = _parse(arguments)
    run = find_run(given.run, base=given.base)
    first = Candidate(run, given.experts, given.lut, find_plug_in(given.attach, run))
    with caused_by("--lut"):
        require_table(first.owner, first.experts, first.lut)
    if given.compare == "lut" and given.experts == "auto":  # the first is then this run's other form
        first = replace(first, experts="ffn")
    second = None if given.compare is None else _other(first, given.compare)
    if second == first:
        raise ConfigError(f"--compare {given.compare}: that is what --experts and --lut name already; compare another")
    if second is not None:
        with caused_by("--compare"):
            require_table(second.owner, second.experts, second.lut)
    config = load_run_config(first.run)
    asked, (text, note) = _evaluation_config(config.evaluation, given), held_out_of_run(first.run, config.data)
    console = Console()
    with caused_by("--tasks" if given.tasks else "evaluation.tasks", "evaluation.tasks"):
        suite = prepare_suite(text, asked)
    for remark in (note, *suite.notes):
        print_note(remark)
    name, evaluation = _evaluate(first, suite, asked.batch_size, given)
    print_evaluation(evaluation, name, console)
    zlib = zlib_bits_per_byte(text.text)
    console.print(f"zlib -9 of the held-out text, for comparison: {zlib:.4f} bits per byte\n")
    results = {"form": name, **evaluation.texts[0].score.to_dict(), "zlib_bits_per_byte": zlib, **evaluation.to_dict()}
    if second is not None:
        other_name, other = _evaluate(second, suite, asked.batch_size, given)
        rows = compare(evaluation, other)
        print_comparison(rows, name, other_name, console)
        results |= {"compared_with": other_name, "comparison": [row.to_dict() for row in rows]}
    if given.json is not None:
        write_json(given.json, results)


def _parse(arguments: Sequence[str] | None) -> Namespace:
    options = parser("evaluate", __doc__ or "", "python -m src.evaluate --run runs/quickstart --compare ffn")
    add_form_options(options)
    options.epilog = f"{options.epilog}\n\n{describe_tasks()}"
    # The defaults of the next six are in the run's section `evaluation`.
    options.add_argument(
        "--tasks",
        type=lambda names: [name for name in names.split(",") if name],
        help="names with commas between, of those below (default: evaluation.tasks of the run)",
    )
    options.add_argument(
        "--num-fewshot",
        type=number(int, 0),
        metavar="N",
        help="examples in front of each document of lm-eval's tasks (default: as each task defines)",
    )
    options.add_argument(
        "--local-data",
        type=expand_home,
        metavar="DIR",
        help="folder of <task>.<split>.jsonl[.gz] files: the split that is scored, and the one of the examples "
        "(default: lm-eval's tasks are read from the Hugging Face hub)",
    )
    options.add_argument(
        "--limit", type=number(int, 1), dest="task_limit", metavar="N", help="most documents of each task"
    )
    options.add_argument(
        "--batch-size", type=number(int, 1), metavar="N", help="windows per forward pass (default: the run's)"
    )
    options.add_argument(
        "--corpus", action="append", default=[], metavar="NAME=GLOB", help="a text to score; repeatable"
    )
    options.add_argument(
        "--compare",
        type=expand_home,
        metavar="OTHER",
        help="another run, `lut` or `ffn` for this run's other form, or the name of another of its tables",
    )
    options.add_argument("--json", type=output_file, metavar="FILE", help="also write the scores as JSON")
    return options.parse_args(arguments)


def _evaluation_config(config: EvaluationConfig, given: Namespace) -> EvaluationConfig:
    """Return the run's own section, with the overrides of the command line."""
    flags = {name: getattr(given, name) for name in ("tasks", "num_fewshot", "local_data", "task_limit", "batch_size")}
    overrides = {name: value for name, value in flags.items() if value is not None}
    with caused_by("--corpus"):
        config = replace(config, corpora=[*config.corpora, *map(_corpus, given.corpus)])
    if given.local_data is not None and not Path(given.local_data).is_dir():
        raise ConfigError(f"--local-data: {given.local_data} is no directory; name one that has the tasks' files")
    with caused_by("--tasks"):
        return replace(config, **overrides)


def _corpus(option: str) -> EvaluationCorpus:
    name, equals, pattern = option.partition("=")
    if not (name and equals and pattern):
        raise ConfigError(f"--corpus {option!r}: write NAME=GLOB, such as --corpus prose='texts/*.txt'")
    expand_files([pattern], "--corpus")  # names what is not there
    return EvaluationCorpus(name=name, files=[pattern])


def _other(first: Candidate, other: str) -> Candidate:
    """Resolve `--compare`: a form of the same run, a table of it, or another run with the same tokenizer."""
    if other in ("lut", "ffn"):
        return replace(first, experts=cast(ExpertForm, other))
    if (first.owner.lut_path(other) / MANIFEST_NAME).is_file():
        return replace(first, experts="lut", lut=other)
    run = RunDirectory(Path(other))
    if not run.path.is_dir():
        tables = sorted(path.parent.name for path in first.owner.path.glob(f"*/{MANIFEST_NAME}"))
        raise ConfigError(
            f"--compare {other}: neither a run directory nor a table of {first.owner.path}; "
            f"it has {', '.join(tables) or 'no table'}; lut and ffn name the forms"
        )
    find_run(run.path, "--compare")
    prints = [fingerprint(load_tokenizer(each.tokenizer_path)) for each in (first.run, run)]
    if prints[0] != prints[1]:
        raise ConfigError(
            f"--compare {other}: its tokenizer ({prints[1][:12]}) is not that of {first.run.path} ({prints[0][:12]}), "
            "so their tokens cannot be paired; compare runs with one tokenizer"
        )
    return Candidate(run, "auto", "lut")


def _evaluate(candidate: Candidate, suite: Suite, batch_size: int, given: Namespace) -> tuple[str, Evaluation]:
    """Score one model, and name it."""
    run, lut, plug_in = candidate.run, candidate.lut, candidate.attached
    name = run.path.name if plug_in is None else f"{run.path.name} + {plug_in.path.name}"
    suite = replace(suite, text=suite.text.as_trained(load_run_config(candidate.run).data))
    form, device, reader = candidate.experts, given.device, given.reader
    with load_model(run, experts=form, lut=lut, device=device, reader=reader, attach=plug_in) as model:
        form = f"lookup form, {lut}" if isinstance(model.experts, DiskExperts) else "training form"
        return f"{name} ({form})", evaluate_model(model, suite, batch_size=batch_size, progress=progress_bar)


if __name__ == "__main__":
    run_verb(main)
