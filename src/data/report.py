"""Figures of a prepared corpus, source by source, and a table of them."""

from dataclasses import asdict, dataclass

import numpy as np
from rich.console import Console

from src.data.cache import PreparedSource
from src.data.config import DataConfig
from src.data.packed_corpus import PackedCorpus
from src.data.windows import training_windows
from src.system.console import text_table

BLOCK_TOKENS = 1 << 14
_BLOCKS = 32


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


def describe_sources(corpus: PackedCorpus, config: DataConfig) -> list[SourceReport]:
    """Return the figures of every source."""
    return [_describe(source, config) for source in corpus.sources]


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


def _describe(source: PreparedSource, config: DataConfig) -> SourceReport:
    tally = asdict(source.tally)
    both = source.tally.train + source.tally.validation
    return SourceReport(
        name=source.label,
        documents=both.documents,
        held_out_documents=source.tally.validation.documents,
        tokens=both.tokens,
        bytes_per_token=both.bytes / max(1, both.tokens),
        unique_ids_per_16k=_unique_ids(source, config.sequence_length),
        path=str(source.path),
        **{name: tally[name] for name in ("duplicates", "unremembered", "skipped", "examples")},
    )


def _unique_ids(source: PreparedSource, sequence_length: int) -> float:
    tokens = source.tokens("train")
    num_windows, per_block = (len(tokens) - 1) // sequence_length, max(1, BLOCK_TOKENS // sequence_length)
    blocks = max(1, min(_BLOCKS, num_windows // per_block))
    samples = np.arange(min(num_windows, blocks * per_block), dtype=np.int64)
    if not len(samples):
        return 0.0
    windows = training_windows(tokens, sequence_length, samples, seed=0)[:, :-1]  # (N, T)
    return float(np.mean([len(block.unique()) for block in windows.chunk(blocks)]))
