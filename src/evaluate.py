"""`python -m src.evaluate`: score a run on its held-out text, in either form."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from src.cli import add_form_options, parser, progress_bar, run_verb, stderr_console
from src.config import load_run_config
from src.evaluation.held_out import held_out_of_run
from src.evaluation.perplexity import Score, score_windows, zlib_bits_per_byte
from src.files import write_text
from src.inference import load_model
from src.inference.disk_experts import DiskExperts
from src.run_directory import RunDirectory


def print_score(name: str, score: Score, zlib: float, console: Console) -> None:
    """Print one row of scores and what zlib makes of the same text."""
    table = Table(title=f"held-out text: {score.tokens:,} tokens, {score.bytes:,} bytes", title_justify="left")
    for heading in ("", "loss (nats/token)", "perplexity", "bits per byte"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row(name, f"{score.loss:.4f}", f"{score.perplexity:,.2f}", f"{score.bits_per_byte:.4f}")
    table.add_row("zlib -9, for comparison", "", "", f"{zlib:.4f}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and evaluate."""
    options = parser("evaluate", __doc__ or "", "python -m src.evaluate --run runs/quickstart --experts lut")
    add_form_options(options)
    options.add_argument("--batch-size", type=int, default=16, help="windows per forward pass (default: 16)")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the scores as JSON")
    given = options.parse_args(arguments)
    run = RunDirectory(given.run).require()
    text, warning = held_out_of_run(run, load_run_config(run).data)
    if warning is not None:
        stderr_console().print(f"note: {warning}")
    with (
        load_model(run.path, experts=given.experts, lut=given.lut, device=given.device, reader=given.reader) as model,
        progress_bar("scoring (windows)", len(text.windows)) as advance,
    ):
        form = "lookup form" if isinstance(model.experts, DiskExperts) else "training form"
        score = score_windows(model, text.windows, text.byte_lengths, batch_size=given.batch_size, progress=advance)
    zlib = zlib_bits_per_byte(text.text)
    print_score(form, score, zlib, Console())
    if given.json is not None:
        write_text(given.json, json.dumps({"form": form, **score.to_dict(), "zlib_bits_per_byte": zlib}, indent=1))


if __name__ == "__main__":
    run_verb(main)
