"""The config of a run: every component's section, read from YAML. The only module that knows OmegaConf.

Defaults in code < `base:` file < file < `key=value`. The result consists of plain frozen dataclasses. What a value
means is decided by the type of its key, not by how it looks: a key of type text keeps what was typed.
"""

import ast
import difflib
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MappingNode, Node, ScalarNode, SequenceNode

from src.data.config import DataConfig
from src.errors import ConfigError, UserError, caused_by, check_range
from src.evaluation.config import EvaluationConfig
from src.lut.codecs import CODECS
from src.model.config import OF_TRAINING, ModelConfig
from src.run_directory import PATH_KEYS, PATH_OR_NAME_KEYS, PLUG_IN, SCHEMA_VERSION, TEXT_RULE, RunDirectory
from src.system.files import expand_home
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
    """Run directory whose weights training starts from, with a new optimizer and schedule. Keys of `model` that the
    config does not state are the run's, and so is the tokenizer, with what the run puts before a text. null draws new
    weights."""
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
        if not self.optimizer.trains_backbone and not self.model.num_experts:
            raise ConfigError(
                "optimizer.backbone_multipliers.learning_rate: 0, but a dense model has no experts that could be "
                "trained instead; set model.num_experts, or a learning rate above 0"
            )
        self._check_sharding()
        if self.lut.at_fit_end and self.model.architecture == "mole":
            with caused_by("lut.dtype"):
                CODECS[self.lut.dtype].vector_bytes(self.model.hidden_size)
        if self.name in ("", ".", "..") or "/" in self.name or len(self.name.encode()) > 200:
            raise ConfigError(
                f"name: {_shorten(self.name)}, but it must be a directory name without '/', at most 200 bytes long"
            )

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
        if not self.optimizer.trains_backbone:
            raise ConfigError(
                "optimizer.backbone_multipliers.learning_rate: 0 is not possible with trainer.strategy fsdp2; use ddp"
            )
        if self.trainer.precision == "64-true":
            raise ConfigError("trainer.precision: 64-true is not possible with trainer.strategy fsdp2; use 32-true")
        if self.model.expert_execution == "unique_per_step":
            raise ConfigError(
                "model.expert_execution: unique_per_step keeps rows of a whole step, which trainer.strategy fsdp2 does "
                "not; set it to unique"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config, its `base:` files and `key=value` overrides.

    Raises:
        ConfigError: naming file, dotted key, what was found and what is allowed.
    """
    path = Path(expand_home(str(path)))
    layers = [*_read_layers(path, ()), *(_override_layer(override) for override in overrides)]
    return _compose([*_inherited(layers), *layers], path)


def load_run_config(run: RunDirectory, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the resolved config of a run directory, and `key=value` overrides."""
    run.config_values()  # names what is wrong with the file
    layers = [*_read_layers(run.config_path, ()), *(_override_layer(override) for override in overrides)]
    return _compose(layers, run.config_path)


def describe(config: RunConfig) -> str:
    """Return YAML of every key with its value, and its meaning in a comment above it."""
    return "\n".join(_describe(config, indent=0))


_Layer = tuple[str, dict[str, Any]]
"""Where values are from, and the values."""
_TYPED = "!typed"
"""Tag of a node that holds a value as it was typed on the command line."""


@cache
def _schema() -> DictConfig:
    return OmegaConf.structured(RunConfig)


def _merge(layers: Sequence[_Layer]) -> Any:
    merged: Any = _schema()
    for where, values in layers:
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(values))
        except OmegaConfBaseException as error:
            raise ConfigError(_explain(error, where)) from error
    return merged


def _inherited(layers: Sequence[_Layer]) -> list[_Layer]:
    """Return what a config takes over from the run that it starts from, as a layer below all others."""
    merged = _merge(layers)
    try:
        name = OmegaConf.select(merged, "init_from")
    except OmegaConfBaseException:  # `_compose` explains it
        return []
    if name is None:
        return []
    run = RunDirectory(Path(name))
    is_whole = not any(key.startswith("model") for key in OmegaConf.missing_keys(merged))
    if is_whole and not run.config_path.is_file():
        return []  # whatever needs the run reports it
    with caused_by("init_from", run.path):
        model = run.require().model_config().to_dict()
    values: dict[str, Any] = {"model": {key: model[key] for key in model if key not in OF_TRAINING}}
    tokenizers = [layer.get("data", {}).get("tokenizer", {}) for _, layer in layers]
    if run.tokenizer_path.is_file() and not any({"path", "hub", "vocab_size"} & set(stated) for stated in tokenizers):
        values["data"] = {"tokenizer": {"path": str(run.tokenizer_path)}}
    return [(str(run.config_path), _literal(values))]


def _compose(layers: Sequence[_Layer], path: Path) -> RunConfig:
    merged = _merge(layers)
    try:
        return cast(RunConfig, OmegaConf.to_object(merged))
    except MissingMandatoryValue as error:
        wanted = str(error.full_key)
        remedy = "; give it a value" + (", or name a run with init_from" if wanted.startswith("model") else "")
        raise ConfigError(f"{path}: {wanted} is required{remedy}") from error
    except UserError as error:
        raise ConfigError(f"{path}: {error}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, str(path))) from error


def _read_layers(path: Path, chain: tuple[Path, ...]) -> list[_Layer]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file; see configs/ for the existing ones")
    if path.resolve() in chain:
        raise ConfigError(f"{path}: its base files form a cycle; remove one `base:`")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(node, MappingNode):
        raise ConfigError(f"{path}: holds no `key: value` pairs at its top level; see configs/quickstart.yaml")
    about = {key.value: value for key, value in node.value if key.value in ("base", "schema_version")}
    if "schema_version" in about:
        about |= {key.value: value for key, value in node.value if key.value in (TEXT_RULE, PLUG_IN)}
    node.value = [(key, value) for key, value in node.value if key.value not in about]
    values = _section(node, RunConfig, "", str(path))
    if (version := about.get("schema_version")) is not None:  # a run's own config, whose values are final
        if version.value != str(SCHEMA_VERSION):
            raise ConfigError(f"{path}: schema_version {version.value}, but this version reads {SCHEMA_VERSION}")
        values = _literal(values)
    base = _value(about["base"], str | None, "base", str(path)) if "base" in about else None
    inherited = _read_layers(path.parent / expand_home(base), (*chain, path.resolve())) if base is not None else []
    return [*inherited, (str(path), values)]


def _override_layer(override: str) -> _Layer:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{override!r}: not an override; write key=value, such as trainer.max_steps=100")
    node: Node = ScalarNode(_TYPED, text)
    for name in reversed(key.strip().split(".")):
        node = MappingNode("", [(ScalarNode("", name), node)])
    return "command line", _section(node, RunConfig, "", "command line")


def _section(node: Node, section: type, prefix: str, where: str) -> dict[str, Any]:
    """Return the values of a section by the types of its keys; those with an interpolation are still text."""
    if not isinstance(node, MappingNode):
        raise ConfigError(
            f"{where}: {prefix[:-1]}: found {_found(node)}, but it is a section; set its keys, such as "
            f"{prefix}KEY=VALUE"
        )
    hints, values = get_type_hints(section), dict[str, Any]()
    for key, value in node.value:
        name = str(key.value)
        if name not in hints:
            nearest = _nearest(section, prefix, name)
            raise ConfigError(f"{where}: unknown key {prefix + name!r}; did you mean {nearest!r}?")
        if name in values:
            raise ConfigError(f"{where}: {prefix}{name}: given twice; remove one")
        values[name] = _value(value, hints[name], prefix + name, where)
    return values


def _value(node: Node, hint: Any, key: str, where: str) -> Any:
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kind = kinds[0]
    if node.tag == _TYPED:
        node = _typed(str(node.value), kind)
    if NoneType in kinds and _is_null(node, kind):
        return None
    if is_dataclass(kind):
        return _section(node, cast(type, kind), f"{key}.", where)
    if get_origin(kind) is list:
        if _refers_to_list(node):
            return node.value
        items = node.value if isinstance(node, SequenceNode) else [node]
        return [_value(item, get_args(kind)[0], f"{key}[{index}]", where) for index, item in enumerate(items)]
    wrong = f"{where}: {key}: {_found(node)}, but it must be {_expected(hint)}"
    if not isinstance(node, ScalarNode):
        raise ConfigError(wrong)
    leaf, text = key.rpartition(".")[2].partition("[")[0], node.value
    if leaf in PATH_KEYS or (leaf in PATH_OR_NAME_KEYS and "/" in text):
        try:
            text = expand_home(text)
        except UserError as error:
            raise ConfigError(f"{key}: {error}") from error
    if "${" in text:
        return text
    for kind in kinds:
        with suppress(ValueError, KeyError):
            return _scalar(text, kind, may_be_empty=key == "evaluation.sample_prompt")
    raise ConfigError(wrong)


def _typed(text: str, kind: Any) -> Node:
    """Return what a value typed on the command line is: quoted text, a list or a section in YAML, else plain text."""
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        node = None
    elements = get_args(kind) if get_origin(kind) is list else ()
    is_section = is_dataclass(kind) or any(map(is_dataclass, elements))
    match node:
        case ScalarNode(style="'" | '"'):
            return node
        case SequenceNode() if elements:
            return node
        case MappingNode() if is_section:
            return node
        case _:
            return ScalarNode("", text)


def _scalar(text: str, kind: Any, *, may_be_empty: bool) -> object:
    """Read a value of type `kind`; ValueError or KeyError if it is none."""
    if get_origin(kind) is Literal and text in get_args(kind):
        return text
    if kind is str and (text or may_be_empty) and "\0" not in text and text != "???":  # OmegaConf's missing value
        return text.encode().decode()  # a UnicodeError is a ValueError: text from outside may be no UTF-8
    if kind is bool:
        return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}[text.lower()]
    if kind is int and abs(number := int(text)) < 2**63:
        return number
    if kind is float:
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    raise ValueError(text)


_NULLS = ("null", "Null", "NULL", "~")
_KINDS = {str: "text", bool: "true or false", int: "a whole number of at most 63 bits", float: "a number"}


def _is_null(node: Node, kind: Any) -> bool:
    nulls = ("null",) if kind is str else _NULLS
    return isinstance(node, ScalarNode) and node.style is None and node.value in nulls


def _expected(hint: Any) -> str:
    if isinstance(hint, UnionType):
        first, second = get_args(hint)
        return f"{_expected(first)}, or {'null' if second is NoneType else _expected(second)}"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return _KINDS.get(hint, "a list")


def _found(node: Node) -> str:
    if isinstance(node, ScalarNode):
        return _shorten(node.value)
    return "a list" if isinstance(node, SequenceNode) else "keys with values"


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refers_to_list(node: Node) -> bool:
    """Whether a node is an interpolation of another key that holds a list."""
    match = re.fullmatch(r"\$\{([\w.]+)\}", str(node.value))
    return match is not None and get_origin(_hint(match[1])) is list


def _hint(key: str) -> Any:
    """Return the type of a dotted key, None where there is no such key."""
    hint: Any = RunConfig
    for name in re.findall(r"\w+", key):
        hint = get_type_hints(section).get(name) if (section := _section_of(hint)) else next(iter(get_args(hint)), None)
    return hint


def _section_of(hint: Any) -> type | None:
    """Return the dataclass of a section, also of one that may be null; None for what is no section."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return next((cast(type, kind) for kind in kinds if is_dataclass(kind)), None)


def _literal(value: Any) -> Any:
    """Escape what would be an interpolation."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _nearest(section: type, prefix: str, name: str) -> str:
    known = [*_keys(RunConfig), *_keys(section, prefix)]
    by_leaf = [key for key in known if key.rpartition(".")[2] == name]
    return (by_leaf or difflib.get_close_matches(prefix + name, known, n=1, cutoff=0))[0]


def _keys(section: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(section)
    for item in fields(section):
        yield prefix + item.name
        if section_type := _section_of(hints[item.name]):
            yield from _keys(section_type, f"{prefix}{item.name}.")


def _explain(error: OmegaConfBaseException, where: str) -> str:
    """Say which interpolation failed, or gave a value that its key cannot have."""
    if error.value is None or "${" in str(error.value):
        return f"{where}: {error.full_key}: {str(error).splitlines()[0]}"
    expected = _expected(_hint(error.full_key or ""))
    return f"{where}: {error.full_key}: {_shorten(error.value)}, but it must be {expected}"


def _describe(section: Any, indent: int) -> Iterator[str]:
    pad, meanings, values = " " * indent, _field_docs(type(section)), asdict(section)
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield f"{pad}{item.name}:  # {(type(value).__doc__ or '').splitlines()[0]}"
            yield from _describe(value, indent + 2)
        else:
            yield from textwrap.wrap(
                meanings[item.name], width=100, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# "
            )
            text = yaml.safe_dump({item.name: values[item.name]}, sort_keys=False, allow_unicode=True)
            yield pad + text.strip().replace("\n", f"\n{pad}")


@cache
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
