"""A small definition, and rows that no run measured."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from src.studies.definition import Study, load_study
from src.studies.rows import Row
from tests.conftest import CONFIGS

DEFINITION = f"""
title: Made up
question: Is it?
config: {CONFIGS}/quickstart.yaml
overrides: {{model: {{num_experts: 0}}, trainer: {{max_steps: 2}}}}
seeds: [0, 1, 2]
baseline: dense
smallest_difference: 0.01
search: {{key: optimizer.learning_rate, values: [1e-3, 2e-3], seed: 7, families: {{one: dense}}}}
arms:
  dense: {{label: Dense, family: one}}
  mole: {{label: MoLE, family: one, overrides: {{model: {{num_experts: 2}}}}}}
  moe: {{label: MoE, family: one, overrides: {{model: {{num_experts: 2, expert_input: hidden}}}}}}
hypotheses:
  - {{arm: mole, than: dense, expect: better, because: It reads more.}}
  - {{arm: moe, than: mole, expect: no difference, because: They have as many parameters.}}
"""
PARAMETERS = {"dense": (10, 10, 0), "moe": (30, 10, 20), "mole": (30, 10, 400)}
"""Trained, resident, offloaded."""


def write_study(folder: Path, text: str = DEFINITION) -> Study:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return load_study(path)


def row(arm: str, seed: int, loss: float, value: str = "", **changes: Any) -> Row:
    """Return a row of this loss; other losses, and those of windows, follow from it."""
    kinds = get_type_hints(Row)
    values: dict[str, Any] = {item.name: kinds[item.name](0) for item in fields(Row) if item.default is MISSING}
    trained, resident, offloaded = PARAMETERS[arm]
    has_rows = arm == "mole"
    values |= {
        "arm": arm,
        "seed": seed,
        "value": value,
        "held_out_loss": loss,
        "bits_per_byte": loss / 2,
        "lookup_loss": loss if has_rows else math.nan,
        "zeroed_loss": loss + 0.5 if has_rows else math.nan,
        "permuted_loss": loss + 0.75 if has_rows else math.nan,
        "loss_seen_0": math.nan,
        "loss_seen_10": loss + 1,
        "trained_parameters": trained,
        "resident_parameters": resident,
        "offloaded_parameters": offloaded,
        "corpus": "c0ffee",
        "config": "abc",
        "commit": "1234567",
        "machine": "a processor",
        "threads": 1,
        "tokens": 8192,
        "curve": f"1:{loss + 1} 2:{loss}",
        "window_losses": " ".join(f"{loss + wave:.5f}" for wave in (-0.02, 0.03, -0.01)),
    }
    return Row(**(values | changes))


def rows(dense: Sequence[float], mole: Sequence[float], moe: Sequence[float] = ()) -> list[Row]:
    def reported() -> Iterator[Row]:
        for arm, losses in (("dense", dense), ("mole", mole), ("moe", moe)):
            yield from (row(arm, seed, loss) for seed, loss in enumerate(losses))

    search = [row("dense", 7, loss, value) for value, loss in (("1e-3", 3.5), ("2e-3", 3.25))]
    return [*reported(), *search]
