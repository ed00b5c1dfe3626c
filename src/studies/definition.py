"""A study's definition, `study.yaml`: arms, seeds, hypotheses. Knows no runs and no results.

Its values stay text, as typed: what they mean is decided by the type of the config key that they are for.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

from src.config import RunConfig, load_config
from src.errors import ConfigError
from src.system.files import expand_home

Expectation = Literal["better", "worse", "no difference"]
PLACES = {
    "corpus": "reads a folder of text; name it with corpus=DIR",
    "base": "starts from a run; name it with base=RUN",
}
"""What a definition leaves open as `${corpus}` and `${base}`, and what a study says that needs it."""
PRETRAINING = "pretraining"
_KEYS = (
    *("title", "question", "config", "overrides", "seeds", "baseline", "smallest_difference", "share_of"),
    *("search", PRETRAINING, "arms", "further_arms", "hypotheses", "notes"),
)
_ARM_KEYS = ("label", "like", "config", "overrides", "family", "seeds", "trained", "lora_rank")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the models that are compared."""

    name: str
    label: str
    """How tables and plots call it."""
    config: Path
    overrides: tuple[str, ...]
    """Of the study and of this arm, as `key=value`."""
    seeds: tuple[int, ...]
    family: str | None
    """Which search gives it its value; None where the study has no search."""
    is_required: bool
    """Whether its cells come before those of further arms."""
    is_trained: bool = True
    """False: the run that it starts from is measured as it is."""
    lora_rank: int | None = None
    """Train low-rank sums of this rank in place of the weights (`callbacks/lora.py`)."""


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """What is expected of an arm, written before the runs."""

    arm: str
    than: str
    expect: Expectation
    because: str
    on_general: bool
    """Whether it is about text of the kind that the base was trained on, not about the held-out text."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """One config key, tried with several values on one arm of each family; the best is used for the whole family."""

    key: str
    values: Mapping[str, tuple[str, ...]]
    """Family -> what is tried."""
    seed: int
    """Of no reported cell."""
    families: Mapping[str, str]
    """Family -> the arm that it is searched on."""
    overrides: tuple[str, ...]
    """Of the search's cells alone, as `key=value`: what makes them shorter than reported cells."""
    study: Path
    """The definition whose results have the search: this one, or another that is named by `search.from`."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A definition, checked."""

    path: Path
    title: str
    question: str
    seeds: tuple[int, ...]
    baseline: str
    """The arm that others are compared with."""
    smallest_difference: float
    """In nats per token; what is smaller is of no interest, however certain."""
    share_of: str | None
    """The arm whose gain over the baseline the others' gains are shares of."""
    pretraining: Arm | None
    """The run of each seed that arms start from as `${base}`; None where there is none, or base=RUN names it."""
    arms: Mapping[str, Arm]
    search: Search | None
    hypotheses: tuple[Hypothesis, ...]
    notes: str
    """Markdown for the page."""

    @property
    def name(self) -> str:
        return self.path.resolve().parent.name

    @property
    def results_path(self) -> Path:
        return self.path.parent / "results.csv"

    @property
    def page_path(self) -> Path:
        return self.path.parent / "README.md"


def load_study(path: Path) -> Study:
    """Read a definition.

    Raises:
        ConfigError: naming file, key, what was found and what is allowed.
    """
    values = _read(path)
    _check_keys(values, _KEYS, path, "")
    for key in ("question", "config", "seeds", "baseline", "smallest_difference", "arms"):
        if key not in values:
            raise ConfigError(f"{path}: {key} is required; give it a value")
    arms = _arms(values, path)
    study = Study(
        path=path,
        title=str(values.get("title", path.resolve().parent.name)),
        question=str(values["question"]).strip(),
        seeds=_seeds(values["seeds"], path, "seeds"),
        baseline=_known(str(values["baseline"]), arms, path, "baseline"),
        smallest_difference=_positive(str(values["smallest_difference"]), path, "smallest_difference"),
        share_of=_known(str(values["share_of"]), arms, path, "share_of") if "share_of" in values else None,
        pretraining=_pretraining(values, path),
        arms=arms,
        search=_search(values["search"], path, arms) if "search" in values else None,
        hypotheses=tuple(_hypotheses(values.get("hypotheses") or [], path, arms)),
        notes=str(values.get("notes", "")).strip(),
    )
    _check_families(study)
    return study


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such study; see configs/studies/ for the existing ones")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    return _mapping(values, path, "")


def _mapping(value: Any, path: Path, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {key or 'the file'}: {str(value)[:80]!r}, but it must be keys with values")
    return cast(dict[str, Any], value)


def _check_keys(values: Mapping[str, Any], known: Sequence[str], path: Path, prefix: str) -> None:
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
            raise ConfigError(f"{path}: unknown key {prefix + str(key)!r}; did you mean {prefix + nearest!r}?")


def _flatten(values: Any, prefix: str = "") -> Iterator[str]:
    """Yield the leaves of nested sections as `key=value`."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()}"
        else:
            yield f"{prefix}{key}={value}"


def _default_arm(values: dict[str, Any], path: Path, *, is_required: bool) -> Arm:
    return Arm(
        name="",
        label="",
        config=path.parent / expand_home(str(values["config"])),
        overrides=tuple(_flatten(_mapping(values.get("overrides") or {}, path, "overrides"))),
        seeds=_seeds(values["seeds"], path, "seeds"),
        family=None,
        is_required=is_required,
    )


def _pretraining(values: dict[str, Any], path: Path) -> Arm | None:
    if PRETRAINING not in values:
        return None
    given = _mapping(values[PRETRAINING] or {}, path, PRETRAINING)
    _check_keys(given, ("config", "overrides"), path, f"{PRETRAINING}.")
    return _arm(PRETRAINING, given, path, {}, _default_arm(values, path, is_required=True))


def _arms(values: dict[str, Any], path: Path) -> dict[str, Arm]:
    arms: dict[str, Arm] = {}
    for section in ("arms", "further_arms"):
        default = _default_arm(values, path, is_required=section == "arms")
        for name, arm in _mapping(values.get(section) or {}, path, section).items():
            if name in (*arms, PRETRAINING) or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
                raise ConfigError(f"{path}: {section}.{name}: must be a new name of a-z, 0-9, dots and dashes")
            arms[name] = _arm(name, _mapping(arm or {}, path, f"{section}.{name}"), path, arms, default)
    return arms


def _arm(name: str, values: dict[str, Any], path: Path, earlier: Mapping[str, Arm], default: Arm) -> Arm:
    """Read an arm: what it does not say is as in the arm that it is `like`, or in `default`."""
    _check_keys(values, _ARM_KEYS, path, f"arms.{name}.")
    like = earlier[_known(str(values["like"]), earlier, path, f"arms.{name}.like")] if "like" in values else default
    changes = _flatten(_mapping(values.get("overrides") or {}, path, f"arms.{name}.overrides"))
    return Arm(
        name=name,
        label=str(values.get("label", name)),
        config=path.parent / expand_home(str(values["config"])) if "config" in values else like.config,
        overrides=(*like.overrides, *changes),
        seeds=_seeds(values["seeds"], path, f"arms.{name}.seeds") if "seeds" in values else default.seeds,
        family=values.get("family", like.family),
        is_required=default.is_required,
        is_trained=_switch(values, "trained", path, f"arms.{name}", default=like.is_trained),
        lora_rank=_rank(values["lora_rank"], path, f"arms.{name}") if "lora_rank" in values else like.lora_rank,
    )


def _switch(values: Mapping[str, Any], key: str, path: Path, where: str, *, default: bool) -> bool:
    text = str(values.get(key, default)).lower()
    if text not in ("true", "false"):
        raise ConfigError(f"{path}: {where}.{key}: {text!r}, but it must be true or false")
    return text == "true"


def _rank(value: Any, path: Path, where: str) -> int:
    if not str(value).isdecimal() or not int(value):
        raise ConfigError(f"{path}: {where}.lora_rank: {value!r}, but it must be a whole number above 0")
    return int(value)


def _search(value: Any, path: Path, arms: Mapping[str, Arm]) -> Search:
    values = _mapping(value, path, "search")
    _check_keys(values, ("from", "key", "values", "seed", "families", "overrides"), path, "search.")
    if "from" in values:
        other = path.parent / expand_home(str(values["from"]))
        search = load_study(other).search
        if search is None:
            raise ConfigError(f"{path}: search.from: {other} has no search; name a study that has one")
        return search
    if missing := [key for key in ("key", "values", "seed", "families") if key not in values]:
        raise ConfigError(f"{path}: search.{missing[0]} is required; give it a value")
    families = {
        family: _known(str(arm), arms, path, f"search.families.{family}")
        for family, arm in _mapping(values["families"], path, "search.families").items()
    }
    given = values["values"]
    by_family = given if isinstance(given, dict) else dict.fromkeys(families, given)
    if set(by_family) != set(families):
        raise ConfigError(f"{path}: search.values: {given!r}, but it must name the families: {', '.join(families)}")
    tried = {name: tuple(map(str, item if isinstance(item, list) else [item])) for name, item in by_family.items()}
    (seed,) = _seeds([values["seed"]], path, "search.seed")
    return Search(
        key=str(values["key"]),
        values=tried,
        seed=seed,
        families=families,
        overrides=tuple(_flatten(_mapping(values.get("overrides") or {}, path, "search.overrides"))),
        study=path.resolve(),
    )


def _hypotheses(values: Sequence[Any], path: Path, arms: Mapping[str, Arm]) -> Iterator[Hypothesis]:
    for index, value in enumerate(values):
        where = f"hypotheses[{index}]"
        given = _mapping(value, path, where)
        _check_keys(given, ("arm", "than", "expect", "because", "on_general_text"), path, f"{where}.")
        expect = str(given.get("expect"))
        if expect not in get_args(Expectation):
            raise ConfigError(f"{path}: {where}.expect: {expect!r}, but it must be one of {get_args(Expectation)}")
        yield Hypothesis(
            arm=_known(str(given.get("arm")), arms, path, f"{where}.arm"),
            than=_known(str(given.get("than")), arms, path, f"{where}.than"),
            expect=cast(Expectation, expect),
            because=str(given.get("because", "")).strip(),
            on_general=_switch(given, "on_general_text", path, where, default=False),
        )


def _check_families(study: Study) -> None:
    if study.search is None:
        return
    for arm in study.arms.values():
        if arm.is_trained and arm.family not in study.search.families:
            raise ConfigError(
                f"{study.path}: arms.{arm.name}.family: {arm.family!r}, but it must be one of "
                f"{', '.join(study.search.families)}, which the search gives a value"
            )
    if study.search.seed in study.seeds:
        raise ConfigError(f"{study.path}: search.seed: {study.search.seed} is a reported seed; choose another")


def _known(name: str, arms: Mapping[str, Arm], path: Path, key: str) -> str:
    if name not in arms:
        raise ConfigError(f"{path}: {key}: {name!r}, but it must be an arm: {', '.join(arms) or 'none is above it'}")
    return name


def _seeds(value: Any, path: Path, key: str) -> tuple[int, ...]:
    items = value if isinstance(value, list) else [value]
    if not items or not all(str(item).isdecimal() and int(item) < 2**32 for item in items):
        raise ConfigError(f"{path}: {key}: {value!r}, but it must be whole numbers from 0 to 4294967295")
    if len(set(map(int, items))) < len(items):
        raise ConfigError(f"{path}: {key}: {value!r} has a seed twice; remove one")
    return tuple(map(int, items))


def _positive(text: str, path: Path, key: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e3:
        raise ConfigError(f"{path}: {key}: {text!r}, but it must be a number above 0, in nats per token")
    return value


def with_places(overrides: Sequence[str], places: Mapping[str, str]) -> list[str]:
    """Return overrides with `places` filled in; ConfigError where one is needed and was not given."""
    filled = list(overrides)
    for name, need in PLACES.items():
        if name not in places and any(f"${{{name}}}" in override for override in filled):
            raise ConfigError(f"{name}: this study {need}")
        filled = [override.replace(f"${{{name}}}", places.get(name, "")) for override in filled]
    return filled


def arm_config(arm: Arm, places: Mapping[str, str], more: Sequence[str] = ()) -> RunConfig:
    """Return the config of an arm, without a cell's seed, name and searched value."""
    return load_config(arm.config, [*with_places(arm.overrides, places), *more])
