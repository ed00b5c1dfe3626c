"""What the cells of a study cost, before they run."""

from collections.abc import Sequence

from rich.console import Console

from src.accounting.account import count_parameters
from src.accounting.flops import estimated_unique_ids, step_flops
from src.config import RunConfig
from src.studies.cells import Cell, Choice, reported_cells, search_cells
from src.studies.definition import Study, arm_config
from src.studies.rows import find, read_rows
from src.system.console import text_table

_STORED_COPIES = 4
"""Of each float32 weight on disk after a run: itself, and in the checkpoint with AdamW's two moments."""


def planned_cells(study: Study, choice: Choice) -> list[Cell]:
    """Return the chosen cells and the search that they need, in order."""
    cells = reported_cells(study, choice)
    return [*search_cells(study, {cell.arm.family for cell in cells}), *cells]


def training_tokens(config: RunConfig) -> int:
    """Return the tokens of all steps."""
    return config.trainer.max_steps * config.data.global_batch_size * config.data.sequence_length


def training_flops(config: RunConfig) -> float:
    """Return the operations of a run, distinct ids of a micro-batch estimated."""
    data, model = config.data, config.model
    micro_batches = data.micro_batches_per_step(1)
    ids = micro_batches * estimated_unique_ids(data.micro_batch_size * data.sequence_length, model.vocab_size)
    shape = (micro_batches, data.micro_batch_size, data.sequence_length)
    return config.trainer.max_steps * step_flops(model, shape, ids)


def disk_bytes(config: RunConfig) -> int:
    """Return what a run leaves on disk: weights, checkpoint and table."""
    parameters = count_parameters(config.model)
    table = 2 * parameters.offloaded if config.model.architecture == "mole" else 0
    return _STORED_COPIES * 4 * parameters.trained + table


def print_plan(study: Study, choice: Choice, console: Console) -> None:
    """Print the cells in order, which of them have a result, and what each costs."""
    rows = read_rows(study.results_path)
    table = text_table(study.title, "cell", "", "tokens", "FLOPs", "disk", texts=("cell", ""))
    left: Sequence[RunConfig] = []
    for cell in planned_cells(study, choice):
        config = arm_config(cell.arm, choice.corpus, choice.overrides)
        is_done = find(rows, *cell.key) is not None
        left = [*left, *([] if is_done else [config])]
        figures = f"{training_tokens(config):,}", f"{training_flops(config):.2e}", f"{disk_bytes(config) / 1e6:,.0f} MB"
        table.add_row(cell.name, "has a result" if is_done else "", *figures)
    table.add_section()
    totals = (
        f"{sum(map(training_tokens, left)):,}",
        f"{sum(map(training_flops, left)):.2e}",
        f"{sum(map(disk_bytes, left)) / 1e6:,.0f} MB",
    )
    table.add_row(f"{len(left)} cells to run", "", *totals, style="bold")
    console.print(table)
