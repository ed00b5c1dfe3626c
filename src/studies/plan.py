"""What the cells of a study cost, before they run: tokens, FLOPs, disk, and time from one measured step of each arm."""

import contextlib
import time
from dataclasses import dataclass

import torch
from rich.console import Console

from src.accounting.account import count_parameters, offloaded_bytes
from src.accounting.flops import estimated_unique_ids, step_flops
from src.config import RunConfig
from src.model import Transformer
from src.model.loss import next_token_loss
from src.studies.cells import Cell, Choice, places_of, pretraining_cells, reported_cells, runs_root, search_cells
from src.studies.definition import Study, arm_config
from src.studies.rows import find, read_rows
from src.system.console import text_table
from src.training.optimization import build_optimizer, freeze

_STORED_COPIES = 4
"""Of each float32 weight on disk after a run: itself, and in the checkpoint with AdamW's two moments."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one cell costs."""

    tokens: int
    flops: float
    disk_bytes: int


def planned_cells(study: Study, choice: Choice) -> list[Cell]:
    """Return the chosen cells and the search that they need, in order."""
    cells = reported_cells(study, choice)
    cells = [*search_cells(study, {cell.arm.family for cell in cells}), *cells]
    return [*pretraining_cells(study, choice, cells), *cells]


def cost_of(config: RunConfig) -> Cost:
    """Count a run, with the distinct ids of a micro-batch estimated."""
    data, model, steps = config.data, config.model, config.trainer.max_steps
    micro_batches, size = data.micro_batches_per_step(1), data.micro_batch_windows(1)
    ids = micro_batches * estimated_unique_ids(size * data.sequence_length, model.vocab_size)
    shape = (micro_batches, size, data.sequence_length)
    trains_backbone = config.optimizer.trains_backbone
    parameters = count_parameters(model, trains_backbone=trains_backbone)
    tables = {part.precision: part.total_bytes for part in offloaded_bytes(model, parameters)[0]}
    table = tables.get(config.lut.dtype, 0) if model.architecture == "mole" else 0
    return Cost(
        tokens=steps * data.global_batch_size * data.sequence_length,
        flops=steps * step_flops(model, shape, ids, trains_backbone=trains_backbone),
        disk_bytes=_STORED_COPIES * 4 * parameters.trained + table,
    )


def measure_step(config: RunConfig) -> float:
    """Return the seconds of one optimizer step on the CPU, on random ids, after one that warms up."""
    data, precision = config.data, config.trainer.resolved_precision
    model = Transformer(config.model).to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    freeze(model.named_parameters(), config.optimizer)
    optimizer = build_optimizer(model.named_parameters(), config.optimizer)
    size = data.micro_batch_windows(1), data.sequence_length + 1
    ranks = torch.rand(size, generator=torch.Generator().manual_seed(0)) * torch.log(
        torch.tensor(model.config.vocab_size)
    )
    token_ids = ranks.exp().long().clamp(max=model.config.vocab_size - 1)  # few ids are frequent, as in text
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        for _ in range(data.micro_batches_per_step(1)):
            autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
            with autocast:
                hidden = model.hidden_states(token_ids[:, :-1])
                loss = next_token_loss(hidden, model.head, token_ids[:, 1:])
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
    return seconds


def print_plan(study: Study, choice: Choice, jobs: int, console: Console) -> None:
    """Print the cells in order, which of them have a result, and what each of the others costs."""
    rows, root = read_rows(study.results_path), runs_root(study, choice)
    left, seconds = list[tuple[Cost, float]](), dict[str, float]()
    table = text_table(study.title, "cell", "", "tokens", "FLOPs", "disk", "time", texts=("cell", ""))
    for cell in planned_cells(study, choice):
        if find(rows, *cell.key) is not None:
            table.add_row(cell.name, "has a result")
            continue
        if not cell.arm.is_trained:
            table.add_row(cell.name, "not trained")
            continue
        config = arm_config(cell.arm, places_of(study, choice, cell.seed, root), choice.overrides)
        if cell.arm.name not in seconds:
            seconds[cell.arm.name] = measure_step(config)
        cost, duration = cost_of(config), config.trainer.max_steps * seconds[cell.arm.name]
        left.append((cost, duration))
        table.add_row(cell.name, "", *_shown(cost, duration))
    table.add_section()
    total = Cost(
        tokens=sum(cost.tokens for cost, _ in left),
        flops=sum(cost.flops for cost, _ in left),
        disk_bytes=sum(cost.disk_bytes for cost, _ in left),
    )
    time_left = sum(duration for _, duration in left) / jobs
    table.add_row(f"{len(left)} to run, {jobs} at a time", "", *_shown(total, time_left), style="bold")
    console.print(table)
    console.print("time: of training alone, from one step of each arm, measured here and now", style="dim")


def _shown(cost: Cost, seconds: float) -> tuple[str, str, str, str]:
    return f"{cost.tokens:,}", f"{cost.flops:.2e}", f"{cost.disk_bytes / 1e6:,.0f} MB", f"{seconds / 60:.1f} min"
