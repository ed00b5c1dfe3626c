"""The config of a run: every component's section, read from YAML. The only module that knows OmegaConf.

Defaults in code < `base:` file < file < `key=value`. The result consists of plain frozen dataclasses.
"""

import ast
import difflib
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from src.data.config import DataConfig
from src.errors import ConfigError, check_range
from src.evaluation.config import EvaluationConfig
from src.lut.codecs import CODECS
from src.model.config import ModelConfig
from src.run_directory import RunDirectory
from src.training.config import (
    CheckpointConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainerConfig,
    WandbConfig,
)


@dataclass(frozen=True, kw_only=True)
class LutConfig:
    """How the lookup table is written after training."""

    at_fit_end: bool = True
    """Write weights and table after training; models without embedding experts write weights only."""
    dtype: str = "bfloat16"
    """Precision of the rows: float32, bfloat16, float16, int8, nf4 (even hidden sizes) or nf3 (multiples of 128)."""
    chunk_tokens: int | None = None
    """Rows computed and written at a time; null is as many as fit in 512 MiB of buffers."""

    def __post_init__(self) -> None:
        if self.dtype not in CODECS:
            raise ConfigError(f"lut.dtype: {self.dtype!r}, but it must be one of {', '.join(CODECS)}")
        check_range(self, "lut.", ("chunk_tokens",), at_least=1)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run."""

    name: str
    """Name of the run's directory; a number is appended if it exists."""
    output_dir: str = "runs"
    """Parent of run directories."""
    seed: int = 0
    """Decides initial weights; 0 to 2**32 - 1."""
    init_from: str | None = None
    """Run directory whose weights training starts from, with a new optimizer and schedule; null draws new weights."""
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    lut: LutConfig = field(default_factory=LutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        """Raise ConfigError on sections that do not fit together."""
        check_range(self, "", ("seed",), at_least=0, at_most=2**32 - 1)
        if self.data.sequence_length > self.model.max_sequence_length:
            raise ConfigError(
                f"data.sequence_length: {self.data.sequence_length} exceeds model.max_sequence_length "
                f"({self.model.max_sequence_length}); change one of them"
            )
        if self.data.tokenizer.is_trained_here and self.data.tokenizer.vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"data.tokenizer.vocab_size: {self.data.tokenizer.vocab_size} exceeds model.vocab_size "
                f"({self.model.vocab_size}); enlarge the model's vocabulary or shrink the tokenizer's"
            )
        self._check_sharding()
        if not self.name or "/" in self.name:
            raise ConfigError(f"name: {self.name!r}, but it must be a directory name without '/'")

    def _check_sharding(self) -> None:
        if self.trainer.strategy != "fsdp2":
            if self.checkpoint.sharded:
                raise ConfigError(
                    f"checkpoint.sharded: true, but trainer.strategy {self.trainer.strategy} shards nothing; "
                    "set it to false, or trainer.strategy=fsdp2"
                )
            return
        if self.checkpoint.ema_decay is not None:
            raise ConfigError(
                "checkpoint.ema_decay: not possible with trainer.strategy fsdp2; set it to null, or use ddp"
            )
        if self.model.expert_execution == "unique_per_step":
            raise ConfigError(
                "model.expert_execution: unique_per_step keeps rows of a whole step, which trainer.strategy fsdp2 does "
                "not; set it to unique"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return all values as plain nested dictionaries."""
        return asdict(self)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config, its `base:` files and `key=value` overrides.

    Raises:
        ConfigError: naming file, dotted key, what was found and what is allowed.
    """
    layers = [*_read_layers(Path(path), ()), *(_override_layer(override) for override in overrides)]
    return _compose(layers, Path(path))


def load_run_config(run: RunDirectory, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the resolved config of a run directory, and `key=value` overrides."""
    values = OmegaConf.create(cast(dict[str, Any], run.config_values()))
    layers = [(str(run.config_path), values), *(_override_layer(override) for override in overrides)]
    return _compose(layers, run.config_path)


def describe(config: RunConfig) -> str:
    """Return YAML of every key with its value, and its meaning in a comment above it."""
    return "\n".join(_describe(config, indent=0))


def _compose(layers: Sequence[tuple[str, DictConfig]], path: Path) -> RunConfig:
    merged = OmegaConf.structured(RunConfig)
    for where, values in layers:
        try:
            _require_known_keys(values, where)
            merged = OmegaConf.merge(merged, values)
        except OmegaConfBaseException as error:
            raise ConfigError(_explain(error, where)) from error
    try:
        return cast(RunConfig, OmegaConf.to_object(merged))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{path}: {error.full_key} is required; give it a value") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, str(path))) from error


def _read_layers(path: Path, chain: tuple[Path, ...]) -> list[tuple[str, DictConfig]]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file; see configs/ for the existing ones")
    if path.resolve() in chain:
        raise ConfigError(f"{path}: its base files form a cycle; remove one `base:`")
    try:
        values = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{path}: holds no `key: value` pairs at its top level; see configs/quickstart.yaml")
    base = values.pop("base", None)
    inherited = _read_layers(path.parent / base, (*chain, path.resolve())) if base is not None else []
    return [*inherited, (str(path), values)]


def _override_layer(override: str) -> tuple[str, DictConfig]:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{override!r}: not an override; write key=value, such as trainer.max_steps=100")
    try:
        return "command line", OmegaConf.from_dotlist([override])
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"command line: {override!r} cannot be read: {' '.join(str(error).split())}") from error


def _require_known_keys(values: DictConfig, where: str) -> None:
    known = set(_keys(RunConfig))
    sections = {key.rpartition(".")[0] for key in known}
    for key, value in _given_keys(cast(dict[str, Any], OmegaConf.to_container(values))):
        if key in sections and not isinstance(value, Mapping):
            raise ConfigError(
                f"{where}: {key}: found {value!r}, but it is a section; set its keys, such as {key}.KEY=VALUE"
            )
        if key not in known:
            leaf = key.rpartition(".")[2]
            by_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
            nearest = by_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0)
            raise ConfigError(f"{where}: unknown key {key!r}; did you mean {nearest[0]!r}?")


def _keys(section: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(section)
    for item in fields(section):
        yield prefix + item.name
        if is_dataclass(hints[item.name]):
            yield from _keys(hints[item.name], f"{prefix}{item.name}.")


def _given_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _given_keys(value, f"{prefix}{key}.")


def _explain(error: OmegaConfBaseException, where: str) -> str:
    return f"{where}: {error.full_key}: {str(error).splitlines()[0]}"


def _describe(section: Any, indent: int) -> Iterator[str]:
    pad, meanings = " " * indent, _field_docs(type(section))
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield f"{pad}{item.name}:  # {(type(value).__doc__ or '').splitlines()[0]}"
            yield from _describe(value, indent + 2)
        else:
            yield from textwrap.wrap(
                meanings[item.name], width=100, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# "
            )
            yield pad + OmegaConf.to_yaml({item.name: value}, resolve=True).strip().replace("\n", f"\n{pad}")


def _field_docs(section: type) -> dict[str, str]:
    """Return the string literal under each field of a dataclass."""
    definition = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(section))).body[0])
    docs: dict[str, str] = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
            case _:
                pass
    return docs
