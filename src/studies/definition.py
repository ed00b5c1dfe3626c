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
CORPUS = "${corpus}"
"""What a definition has in place of the folder that `corpus=DIR` names on the command line."""
_KEYS = (
    *("title", "question", "config", "overrides", "seeds", "baseline", "smallest_difference"),
    *("search", "arms", "further_arms", "hypotheses", "notes"),
)


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


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """What is expected of an arm, written before the runs."""

    arm: str
    than: str
    expect: Expectation
    because: str


@dataclass(frozen=True, kw_only=True)
class Search:
    """One config key, tried with several values on one arm of each family; the best is used for the whole family."""

    key: str
    values: tuple[str, ...]
    seed: int
    """Of no reported cell."""
    families: Mapping[str, str]
    """Family -> the arm that it is searched on."""
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


def _arms(values: dict[str, Any], path: Path) -> dict[str, Arm]:
    arms: dict[str, Arm] = {}
    for section in ("arms", "further_arms"):
        default = Arm(
            name="",
            label="",
            config=path.parent / expand_home(str(values["config"])),
            overrides=tuple(_flatten(_mapping(values.get("overrides") or {}, path, "overrides"))),
            seeds=_seeds(values["seeds"], path, "seeds"),
            family=None,
            is_required=section == "arms",
        )
        for name, arm in _mapping(values.get(section) or {}, path, section).items():
            if name in arms or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
                raise ConfigError(f"{path}: {section}.{name}: must be a new name of a-z, 0-9, dots and dashes")
            arms[name] = _arm(name, _mapping(arm or {}, path, f"{section}.{name}"), path, arms, default)
    return arms


def _arm(name: str, values: dict[str, Any], path: Path, earlier: Mapping[str, Arm], default: Arm) -> Arm:
    """Read an arm: what it does not say is as in the arm that it is `like`, or in `default`."""
    _check_keys(values, ("label", "like", "config", "overrides", "family", "seeds"), path, f"arms.{name}.")
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
    )


def _search(value: Any, path: Path, arms: Mapping[str, Arm]) -> Search:
    values = _mapping(value, path, "search")
    _check_keys(values, ("from", "key", "values", "seed", "families"), path, "search.")
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
    tried = values["values"] if isinstance(values["values"], list) else [values["values"]]
    (seed,) = _seeds([values["seed"]], path, "search.seed")
    return Search(
        key=str(values["key"]), values=tuple(map(str, tried)), seed=seed, families=families, study=path.resolve()
    )


def _hypotheses(values: Sequence[Any], path: Path, arms: Mapping[str, Arm]) -> Iterator[Hypothesis]:
    for index, value in enumerate(values):
        where = f"hypotheses[{index}]"
        given = _mapping(value, path, where)
        _check_keys(given, ("arm", "than", "expect", "because"), path, f"{where}.")
        expect = str(given.get("expect"))
        if expect not in get_args(Expectation):
            raise ConfigError(f"{path}: {where}.expect: {expect!r}, but it must be one of {get_args(Expectation)}")
        yield Hypothesis(
            arm=_known(str(given.get("arm")), arms, path, f"{where}.arm"),
            than=_known(str(given.get("than")), arms, path, f"{where}.than"),
            expect=cast(Expectation, expect),
            because=str(given.get("because", "")).strip(),
        )


def _check_families(study: Study) -> None:
    if study.search is None:
        return
    for arm in study.arms.values():
        if arm.family not in study.search.families:
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


def with_corpus(overrides: Sequence[str], corpus: str | None) -> list[str]:
    """Return overrides with the corpus folder in its places; ConfigError where one is needed and none was given."""
    if corpus is None and any(CORPUS in override for override in overrides):
        raise ConfigError("corpus: this study reads a folder of text; name it with corpus=DIR")
    return [override.replace(CORPUS, corpus or "") for override in overrides]


def arm_config(arm: Arm, corpus: str | None, more: Sequence[str] = ()) -> RunConfig:
    """Return the config of an arm, without a cell's seed, name and searched value."""
    return load_config(arm.config, [*with_corpus(arm.overrides, corpus), *more])
