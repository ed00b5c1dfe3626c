"""`python -m src.prepare_data`: tokenize the corpus of a config into the cache, and report what it holds."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from src.cli import parser, run_verb
from src.config import load_config
from src.data.packed_corpus import prepare_corpus
from src.data.report import describe_sources, print_sources
from src.system.console import progress_report, stderr_console
from src.system.files import write_json


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, prepare, report."""
    options = parser(
        "prepare_data",
        f"{__doc__} The next call continues an interrupted one; what is finished is not done again.",
        "python -m src.prepare_data --config configs/data/wikitext-103.yaml",
    )
    options.add_argument("--config", required=True, help="YAML config of a run; its data section is used")
    options.add_argument("--json", type=Path, metavar="PATH", help="also write the figures as JSON")
    options.add_argument("overrides", nargs="*", metavar="key=value", help="override a config key, such as data.seed=1")
    given = options.parse_args(arguments)
    config = load_config(given.config, given.overrides)
    with progress_report(stderr_console()) as report:
        corpus = prepare_corpus(config.data, vocab_size=config.model.vocab_size, report=report)
    reports = describe_sources(corpus, config.data)
    print_sources(reports, Console())
    if given.json is not None:
        figures = {"fingerprint": corpus.fingerprint, "sources": [asdict(source) for source in reports]}
        write_json(given.json, figures)


if __name__ == "__main__":
    run_verb(main)
