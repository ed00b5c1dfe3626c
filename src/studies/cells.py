"""The cells of a study: which there are, in which order, with which configs, and which config a result is of."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from src.config import RunConfig
from src.errors import ConfigError
from src.run_directory import RunDirectory, map_paths
from src.studies.definition import Arm, Search, Study, arm_config, with_places
from src.studies.rows import Row, find

DIGITS = 12
"""Of fingerprints in results."""
_NO_RESULT = {
    *("name", "output_dir", "wandb", "trainer.enable_progress_bar"),
    *("data.cache_dir", "data.num_workers", "data.prepare_processes"),
}
"""Keys that change no number."""


_DECIDED = {"seed", "name", "data.shuffle_seed"}


@dataclass(frozen=True)
class Cell:
    """One training run of a study."""

    arm: Arm
    seed: int
    value: str = ""
    """Of the searched key; empty in reported cells."""

    @property
    def name(self) -> str:
        """The run's directory."""
        return f"{self.arm.name}{f'-{self.value}' if self.value else ''}-s{self.seed}"

    @property
    def key(self) -> tuple[str, int, str]:
        return self.arm.name, self.seed, self.value


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What of a study is run, and how: the command line."""

    arms: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    overrides: Sequence[str] = ()
    places: Mapping[str, str] = field(default_factory=dict[str, str])
    """What stands for `${corpus}` and `${base}`."""


def reported_cells(study: Study, choice: Choice) -> list[Cell]:
    """Return the chosen cells in order: seed by seed, those of required arms first."""
    cells: list[Cell] = []
    for is_required in (True, False):
        arms = [
            arm
            for arm in study.arms.values()
            if arm.is_required == is_required and (choice.arms is None or arm.name in choice.arms)
        ]
        for seed in sorted({seed for arm in arms for seed in arm.seeds}):
            cells += [
                Cell(arm, seed) for arm in arms if seed in arm.seeds and (choice.seeds is None or seed in choice.seeds)
            ]
    return cells


def search_cells(study: Study, families: set[str | None]) -> list[Cell]:
    """Return the cells of the study's own search, for these families."""
    search = study.search
    if search is None or search.study != study.path.resolve():
        return []
    wanted = {family: study.arms[arm] for family, arm in search.families.items() if family in families}
    return [
        Cell(replace(arm, overrides=(*arm.overrides, *search.overrides)), search.seed, value)
        for family, arm in wanted.items()
        for value in search.values[family]
    ]


def best_value(search: Search, family: str, rows: Sequence[Row]) -> str | None:
    """Return the value with the lowest held-out loss; None while one has no result."""
    tried = search.values[family]
    found = {value: find(rows, search.families[family], search.seed, value) for value in tried}
    losses = {value: row.held_out_loss for value, row in found.items() if row is not None}
    if len(losses) < len(tried) or not any(map(math.isfinite, losses.values())):
        return None
    return min(losses, key=lambda value: losses[value] if math.isfinite(losses[value]) else math.inf)


def pretraining_cells(study: Study, choice: Choice, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells that train what these start from."""
    if study.pretraining is None or "base" in choice.places:
        return []
    return [Cell(study.pretraining, seed) for seed in sorted({cell.seed for cell in cells})]


def places_of(study: Study, choice: Choice, seed: int, root: Path) -> Mapping[str, str]:
    """Return what stands for `${corpus}` and `${base}` in the cells of a seed."""
    base = {} if study.pretraining is None else {"base": str(root / Cell(study.pretraining, seed).name)}
    return {**base, **choice.places}


def cell_overrides(study: Study, cell: Cell, choice: Choice, best: str | None, root: Path) -> list[str]:
    """Return the `key=value` arguments of a cell's process; later ones win.

    `best` is the searched value of the arm's family, where the cell has none of its own.
    """
    value = cell.value or best
    searched = [f"{study.search.key}={value}"] if study.search is not None and value is not None else []
    return [
        *with_places(cell.arm.overrides, places_of(study, choice, cell.seed, root)),
        *searched,
        *choice.overrides,
        f"seed={cell.seed}",
        f"data.shuffle_seed={cell.seed}",
        f"output_dir={root}",
        f"name={cell.name}",
    ]


def runs_root(study: Study, choice: Choice) -> Path:
    """Return the folder of the cells' run directories."""
    first = study.pretraining or next(iter(study.arms.values()))
    return Path(arm_config(first, choice.places, choice.overrides).output_dir) / "studies" / study.name


def config_digest(config: RunConfig, arm: Arm | None = None) -> str:
    """Return a fingerprint of what decides a run's numbers: every value that is not its default, but names and paths.

    A default that a later version adds therefore leaves it as it is. `arm` adds what no config says.
    """
    values = map_paths(_nested(dict(_decisive(config))), lambda _: "")
    if config.init_from is not None:  # the tokenizer is that run's, which may be gone by now
        values.get("data", {}).pop("tokenizer", None)
    values["precision"] = config.trainer.resolved_precision
    if arm is not None and arm.lora_rank is not None:
        values["lora_rank"] = arm.lora_rank
    if arm is not None and not arm.is_trained:
        values["trained"] = False
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def _decisive(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for item in fields(section):
        key, value = prefix + item.name, getattr(section, item.name)
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if key in _NO_RESULT:
            continue
        if is_dataclass(value) and default is not None:
            yield from _decisive(value, f"{key}.")
        elif isinstance(value, list):
            if value != default:
                yield key, [dict(_decisive(part)) if is_dataclass(part) else part for part in value]
        elif value != default:
            yield key, asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Group `a.b` by its parts, so that the last one is the key."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        section = nested
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    return nested


def is_finished(run: RunDirectory, config: RunConfig) -> bool:
    """Whether a run has all its steps, its final report and scores."""
    record = run.record() if run.config_path.is_file() else {}
    all_steps = record.get("steps") == config.trainer.max_steps or config.trainer.max_time is not None
    return "evaluation" in record and all_steps and run.scores_path.is_file()


def require_known(study: Study, choice: Choice) -> None:
    """Raise ConfigError for an arm or seed that the study does not have, and for overrides of what it decides."""
    for override in choice.overrides:
        if (key := override.partition("=")[0].strip()) in _DECIDED:
            raise ConfigError(f"{key}: a study decides it, cell by cell; choose cells with --arms and --seeds")
    seeds = {seed for arm in study.arms.values() for seed in arm.seeds}
    for option, given, known in (("--arms", choice.arms, study.arms), ("--seeds", choice.seeds, seeds)):
        for item in given or ():
            if item not in known:
                shown = ", ".join(str(name) for name in known)
                raise ConfigError(f"{option}: {study.path} has no {item}; choose from {shown}")
