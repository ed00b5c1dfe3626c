"""`python -m src.prepare_data`: tokenize the corpus of a config into the cache, and report what it holds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from src.cli import find_config, output_file, parser, run_verb
from src.config import load_config
from src.data.cache import PreparedSource
from src.data.packed_corpus import prepare_corpus
from src.data.windows import training_windows
from src.system.console import progress_report, stderr_console, text_table
from src.system.files import naming, write_json
from src.training.resume import starting_rule

_BLOCK_TOKENS, _MOST_BLOCKS = 1 << 14, 32


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """The figures of one source, both splits together unless they say otherwise."""

    name: str
    documents: int
    held_out_documents: int
    tokens: int
    bytes_per_token: float
    """UTF-8 bytes of text per id, separators included."""
    unique_ids_per_16k: float
    """Different ids among 16,384 of training windows drawn at random: what one step looks up. It depends on the
    vocabulary, the text and the window."""
    duplicates: int
    unremembered: int
    skipped: dict[str, int]
    examples: dict[str, str]
    path: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, prepare, report."""
    options = parser(
        "prepare_data",
        f"{__doc__} The next call continues an interrupted one; what is finished is not done again.",
        "python -m src.prepare_data --config configs/data/wikitext-103.yaml",
    )
    options.add_argument("--config", type=Path, required=True, help="YAML config of a run; its data section is used")
    options.add_argument("--json", type=output_file, metavar="PATH", help="also write the figures as JSON")
    options.add_argument("overrides", nargs="*", metavar="key=value", help="override a config key, such as data.seed=1")
    given = options.parse_args(arguments)
    config = load_config(find_config(given.config), given.overrides)
    with naming("data.cache_dir", Path(config.data.cache_dir)), progress_report(stderr_console()) as report:
        rule = starting_rule(config.init_from, config.data.tokenizer)
        corpus = prepare_corpus(config.data, rule, vocab_size=config.model.vocab_size, report=report)
    reports = [describe_source(source, config.data.sequence_length) for source in corpus.sources]
    print_sources(reports, Console())
    if given.json is not None:
        write_json(given.json, {"fingerprint": corpus.fingerprint, "sources": [asdict(each) for each in reports]})


def describe_source(source: PreparedSource, sequence_length: int) -> SourceReport:
    """Return the figures of a source that is read in windows of `sequence_length`."""
    tally = asdict(source.tally)
    both = source.tally.train + source.tally.validation
    return SourceReport(
        name=source.label,
        documents=both.documents,
        held_out_documents=source.tally.validation.documents,
        tokens=both.tokens,
        bytes_per_token=both.bytes / max(1, both.tokens),
        unique_ids_per_16k=_unique_ids(source, sequence_length),
        path=str(source.path),
        **{name: tally[name] for name in ("duplicates", "unremembered", "skipped", "examples")},
    )


def _unique_ids(source: PreparedSource, sequence_length: int) -> float:
    tokens = source.tokens("train")
    num_windows, per_block = (len(tokens) - 1) // sequence_length, max(1, _BLOCK_TOKENS // sequence_length)
    blocks = max(1, min(_MOST_BLOCKS, num_windows // per_block))
    samples = np.arange(min(num_windows, blocks * per_block), dtype=np.int64)
    if not len(samples):
        return 0.0
    windows = training_windows(tokens, sequence_length, samples, seed=0)[:, :-1]  # (N, T)
    return float(np.mean([len(block.unique()) for block in windows.chunk(blocks)]))


def print_sources(reports: list[SourceReport], console: Console) -> None:
    """Print a table of sources, and under it the first record of every kind that was skipped."""
    headings = ("source", "documents", "tokens", "bytes/\ntoken", "ids per\n16k", "duplicates", "skipped")
    table = text_table("", *headings, texts=("source", "documents", "skipped"))
    for report in reports:
        skipped = ", ".join(f"{count:,} {problem}" for problem, count in sorted(report.skipped.items()))
        table.add_row(
            report.name,
            f"{report.documents:,} ({report.held_out_documents:,} held out)",
            f"{report.tokens:,}",
            f"{report.bytes_per_token:.3f}",
            f"{report.unique_ids_per_16k:,.0f}",
            f"{report.duplicates:,}" + (f"\n({report.unremembered:,} not\nremembered)" if report.unremembered else ""),
            skipped or "none",
        )
    console.print(table)
    for report in reports:
        for problem, example in sorted(report.examples.items()):
            console.print(f"first {problem} record of {report.name}: {example}", soft_wrap=True, highlight=False)
        console.print(f"{report.name} is cached in {report.path}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    run_verb(main)
