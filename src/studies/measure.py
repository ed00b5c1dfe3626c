"""Makes a row of `results.csv` from the run directory of a finished cell."""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from callbacks.lora import count_lora
from src.accounting.account import count_parameters, offloaded_bytes
from src.accounting.flops import count_computed_ids, step_flops
from src.config import RunConfig, load_run_config
from src.data.datamodule import StepWindows
from src.data.packed_corpus import PackedCorpus
from src.evaluation.equivalence import permuted_rows, zeroed_rows
from src.evaluation.held_out import HeldOut, held_out, held_out_of_run
from src.evaluation.perplexity import loss_by_frequency, summarize, window_losses
from src.evaluation.results import read_scores
from src.inference import load_model
from src.model import Transformer
from src.run_directory import RunDirectory
from src.studies.cells import DIGITS, Cell, config_digest
from src.studies.rows import FREQUENCIES, Row
from src.system.hardware import processor_name
from src.training.tracking import code_version


@dataclass(frozen=True)
class _Metrics:
    """The rows of `metrics.csv`, by column."""

    rows: Sequence[dict[str, str]]

    def column(self, name: str) -> list[tuple[int, float]]:
        """Return steps and values, where there are any."""
        return [(int(row["step"]), float(value)) for row in self.rows if (value := row.get(name))]


def measure(run: RunDirectory, cell: Cell, config: RunConfig, corpus: PackedCorpus) -> Row:
    """Return the row of a finished run; scores its model again where it has rows of a table, or started from a run."""
    record, scores = run.record(), read_scores(run.scores_path)
    form = scores["training_form"].texts[0]
    lookup = scores["lookup_form"].texts[0].score.loss if "lookup_form" in scores else math.nan
    zeroed, permuted = _controls(run, config)
    metrics = _read_metrics(run)
    entropies, speeds = metrics.column("train/router/entropy"), metrics.column("train/tokens_per_second")
    parameters = count_parameters(config.model, trains_backbone=config.optimizer.trains_backbone)
    if config.model.expert_ids == "seen":
        seen = int(corpus.token_counts(config.model.vocab_size).count_nonzero())
        parameters = replace(parameters, offloaded=parameters.loaded_per_token * seen)
    if (rank := cell.arm.lora_rank) is not None:
        parameters = replace(parameters, trained=count_lora(config.model, rank))
    tokens = int(record["trained_tokens"])
    return Row(
        arm=cell.arm.name,
        seed=cell.seed,
        value=cell.value,
        held_out_loss=form.score.loss,
        bits_per_byte=form.score.bits_per_byte,
        lookup_loss=lookup,
        zeroed_loss=zeroed,
        permuted_loss=permuted,
        **_bands("loss_seen", {band.least: band.loss for band in form.bands}),
        router_entropy=entropies[-1][1] if entropies else math.nan,
        trained_parameters=parameters.trained,
        resident_parameters=parameters.resident,
        offloaded_parameters=parameters.offloaded,
        bytes_per_token=_bytes_per_token(config),
        training_flops=_training_flops(config, corpus, int(record["steps"])) if rank is None else math.nan,
        tokens=tokens,
        seconds=round(tokens / statistics.median(speed for _, speed in speeds), 1) if speeds else math.nan,
        threads=int(record["machine"]["threads"]),
        corpus=corpus.fingerprint[:DIGITS],
        config=config_digest(config, cell.arm),
        commit=_commit(record["code"]),
        machine=_machine(record["machine"]),
        curve=" ".join(f"{step + 1}:{loss:.4f}" for step, loss in metrics.column("val/loss")),
        window_losses=_joined(form.window_losses),
        **_after_start(run, config),
    )


def measure_untrained(cell: Cell, config: RunConfig, corpus: PackedCorpus) -> Row:
    """Return the row of the run that `config` starts from, measured on the text of `config`."""
    assert config.init_from is not None
    text = held_out(corpus, config.data, config.model.vocab_size, config.evaluation.corpora)
    size, run = config.evaluation.batch_size, RunDirectory(Path(config.init_from))
    with load_model(run.path, experts="ffn", dtype=torch.float32) as model:
        losses = window_losses(model, text.windows, batch_size=size, mask=text.mask)
        found = _of_started(model, config, text, losses)
    score = summarize(losses, text.windows, text.byte_lengths)
    bands = {band.least: band.loss for band in loss_by_frequency(losses, text.windows[:, 1:], text.token_counts)}
    return Row(
        arm=cell.arm.name,
        seed=cell.seed,
        value=cell.value,
        held_out_loss=score.loss,
        bits_per_byte=score.bits_per_byte,
        lookup_loss=math.nan,
        zeroed_loss=math.nan,
        permuted_loss=math.nan,
        **_bands("loss_seen", bands),
        router_entropy=math.nan,
        trained_parameters=0,
        resident_parameters=count_parameters(config.model).resident,
        offloaded_parameters=0,
        bytes_per_token=0,
        training_flops=0.0,
        tokens=0,
        seconds=0.0,
        threads=torch.get_num_threads(),
        corpus=corpus.fingerprint[:DIGITS],
        config=config_digest(config, cell.arm),
        commit=_commit(code_version()),
        machine=torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name(),
        curve="",
        window_losses=_joined(losses.double().mean(dim=1).tolist()),
        **found,
    )


def _after_start(run: RunDirectory, config: RunConfig) -> dict[str, Any]:
    """Return what `_of_started` does for a run; nothing for one that started from random weights."""
    if config.init_from is None:
        return {}
    text, size = held_out_of_run(run, config.data)[0], config.evaluation.batch_size
    with load_model(run.path, experts="ffn", dtype=torch.float32) as model:
        losses = window_losses(model, text.windows, batch_size=size, mask=text.mask)
        return _of_started(model, config, text, losses)


def _of_started(model: Transformer, config: RunConfig, text: HeldOut, losses: Tensor) -> dict[str, Any]:
    """Return what is asked of a model that started from a run: the loss after each id, and on text of the base's kind.

    `losses` (N, T) are those of the held-out windows. Text of the base's kind is the base's own held-out text; of an
    import, the first of `evaluation.corpora`.
    """
    after = loss_by_frequency(losses, text.windows[:, :-1], text.token_counts)
    found: dict[str, Any] = _bands("loss_after", {band.least: band.loss for band in after})
    base, general = RunDirectory(Path(str(config.init_from))), next(iter(text.corpora.values()), None)
    if base.held_out_path.is_file():
        general = held_out_of_run(base, load_run_config(base).data)[0].windows
    if general is not None:
        by_window = window_losses(model, general, batch_size=config.evaluation.batch_size, mask=text.mask)
        by_window = by_window.double().mean(dim=1)
        found |= {"general_loss": by_window.mean().item(), "general_window_losses": _joined(by_window.tolist())}
    return found


def _joined(losses: Sequence[float]) -> str:
    return " ".join(f"{loss:.5f}" for loss in losses)


def _read_metrics(run: RunDirectory) -> _Metrics:
    with (run.path / "metrics.csv").open(newline="", encoding="utf-8") as handle:
        return _Metrics(list(csv.DictReader(handle)))


@torch.no_grad()
def _controls(run: RunDirectory, config: RunConfig) -> tuple[float, float]:
    """Return the held-out losses with zeroed and with permuted rows; NaN where no rows are looked up."""
    if config.model.architecture != "mole":
        return math.nan, math.nan
    text, _ = held_out_of_run(run, config.data)
    with load_model(run.path, experts="ffn", dtype=torch.float32) as model:
        size = config.evaluation.batch_size
        zeroed, permuted = (
            text.score(model, batch_size=size, rows_of=rows_of(model)).loss for rows_of in (zeroed_rows, permuted_rows)
        )
    return zeroed, permuted


def _bands(prefix: str, losses: Mapping[int, float]) -> dict[str, float]:
    return {f"{prefix}_{least}": losses.get(least, math.nan) for least in FREQUENCIES}


def _bytes_per_token(config: RunConfig) -> int:
    offload, _ = offloaded_bytes(config.model, count_parameters(config.model))
    in_table_precision = [part.bytes_per_token for part in offload if part.precision == config.lut.dtype]
    return in_table_precision[0] if in_table_precision else 0


def _training_flops(config: RunConfig, corpus: PackedCorpus, steps: int) -> float:
    """Return the operations of all steps; MoLE's experts count as often as they ran, by reading the windows again."""
    windows, total = StepWindows(corpus, config.data, rank=0, world_size=1), 0.0
    shape = (windows.micro_batches, windows.size, config.data.sequence_length)
    for step in range(steps):
        is_mole = config.model.architecture == "mole"
        computed = count_computed_ids(config.model, windows[step][:, :, :-1]) if is_mole else 0
        total += step_flops(config.model, shape, computed, trains_backbone=config.optimizer.trains_backbone)
    return total


def _commit(code: dict[str, Any]) -> str:
    return (code["commit"] or code["version"] or "unknown")[:DIGITS] + ("-modified" if code["modified"] else "")


def _machine(machine: dict[str, Any]) -> str:
    return machine["accelerator"] or machine["processor"]
