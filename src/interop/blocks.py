"""Folders of transformers whose models are ours under other names: what each family of them has to say about itself.

Arithmetic on names, tensors and settings; no files. A family is a map of settings, a map of names, and the settings of
which only one value is supported. Whatever else config.json holds does not change what is computed.

D hidden, F intermediate, H heads, G heads of keys and values, K head dimension, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from src.errors import CheckpointError, ConfigError
from src.interop.names import Correspondence
from src.model import ModelConfig
from src.model.config import RopeScaling

Values = Mapping[str, object]


class Setting(NamedTuple):
    """A field of config.json."""

    name: str
    kind: type
    default: object = ...
    """What transformers takes where the field is missing; `...` where it must be given."""
    may_be_null: bool = False

    def read(self, values: Values, where: str) -> Any:
        """Return its value in config.json; CheckpointError, naming `where`, for one of another kind."""
        found = values.get(self.name, self.default)
        if found is None and self.may_be_null:
            return None
        if self.kind is float and type(found) is int:
            return float(found)
        if type(found) is not self.kind:
            kinds = {int: "an integer", float: "a number", bool: "true or false"}
            shown = "missing" if found is ... else repr(found)
            raise CheckpointError(f"{where}: {self.name} is {shown}, but it must be {kinds[self.kind]}")
        return found


@dataclass(frozen=True, kw_only=True)
class BlockFamily:
    """Models with one `model_type`."""

    model_type: str
    architecture: str
    """The class that transformers has for them."""
    settings: Mapping[str, Setting]
    """The config map: keys of ModelConfig, and the fields that say the same."""
    layer_names: Mapping[str, str]
    """The name map: parameters of one of our blocks, but for `attention.qkv`, and those of one of their layers."""
    block: Mapping[str, object]
    """Keys of ModelConfig that are the same in the whole family."""
    supported: Mapping[str, object]
    """Fields that would change what is computed, each with the one value that is supported, and that it has where it is
    missing or null."""
    refuse: Callable[[Values, str], None] | None = None
    """Raises CheckpointError for fields that depend on each other."""

    def read_config(self, values: Values, where: str) -> ModelConfig:
        """Read the shape of a model from config.json.

        Raises CheckpointError, naming `where` and the field, for what cannot be expressed.
        """
        self._require_supported(values, where)
        found = {ours: setting.read(values, where) for ours, setting in self.settings.items()}
        found |= {**self.block, "rope_theta": _rope_theta(values, where), "rope_scaling": _rope_scaling(values, where)}
        try:
            config = ModelConfig.from_dict(found, where)
            if config.kv_heads == config.num_heads:
                config = replace(config, num_kv_heads=None)
            if config.attention_head_dim * config.num_heads == config.hidden_size:
                config = replace(config, head_dim=None)
        except ConfigError as error:
            raise CheckpointError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
        return config

    def write_config(self, config: ModelConfig) -> dict[str, object] | None:
        """Return config.json of a model, which `read_config` reads again; None if it is not of this family."""
        if config.num_experts or any(getattr(config, ours) != value for ours, value in self.block.items()):
            return None
        values = {setting.name: getattr(config, ours) for ours, setting in self.settings.items()}
        scaling = None if config.rope_scaling is None else {"rope_type": "llama3", **asdict(config.rope_scaling)}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **values,
            **{name: value for name, value in self.supported.items() if value is not None},
            "sliding_window": None,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.attention_head_dim,
            "rope_theta": config.rope_theta,
            "rope_scaling": scaling,
        }

    def correspondences(self, config: ModelConfig) -> list[Correspondence]:
        """Return which of their tensors make up each of ours."""
        found = [
            Correspondence("embedding.weight", ("model.embed_tokens.weight",)),
            Correspondence("norm.weight", ("model.norm.weight",)),
        ]
        if not config.tie_embeddings:
            found.append(Correspondence("head.weight", ("lm_head.weight",)))
        rows = tuple(heads * config.attention_head_dim for heads in (config.num_heads, *[config.kv_heads] * 2))
        for layer in range(config.num_layers):
            ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
            for kind in ("weight", "bias") if config.attention_bias else ("weight",):
                parts = tuple(f"{theirs}self_attn.{part}_proj.{kind}" for part in "qkv")
                found.append(Correspondence(f"{ours}attention.qkv.{kind}", parts, "concatenated", rows))
            found += [Correspondence(ours + mine, (theirs + name,)) for mine, name in self.layer_names.items()]
        return found

    def _require_supported(self, values: Values, where: str) -> None:
        for name, expected in self.supported.items():
            if values.get(name) not in (None, expected):
                raise CheckpointError(f"{where}: {name} is {values[name]!r}, but only {expected!r} is supported here")
        found = values.get("architectures")
        if found is not None and found != [self.architecture]:
            raise CheckpointError(
                f"{where}: architectures is {found!r}, but only {[self.architecture]!r} is supported here"
            )
        if self.refuse is not None:
            self.refuse(values, where)


SUPPORTED: Values = {
    "hidden_act": "silu",
    "num_experts": None,
    "num_local_experts": None,
    "quantization_config": None,
    "auto_map": None,
}
"""Of every family: no experts, plain numbers, no code in the folder."""


_ROPE_FIELDS = tuple(item.name for item in fields(RopeScaling))
_OF_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_FIELDS}


def _rope_section(values: Values, where: str) -> tuple[str, Values]:
    """Return the name and content of the section about the rotary embedding; newer versions write `rope_parameters`."""
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    section = values.get(name) or {}
    if not isinstance(section, Mapping):
        raise CheckpointError(f"{where}: {name} is {section!r}, but it must be an object")
    return name, section


def _rope_theta(values: Values, where: str) -> object:
    section = _rope_section(values, where)[1]
    return Setting("rope_theta", float, 10000.0).read({**values, **section}, where)


def _rope_scaling(values: Values, where: str) -> RopeScaling | None:
    """Return Llama 3's scaling, or None; CheckpointError for any other."""
    name, section = _rope_section(values, where)
    partial = section.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise CheckpointError(f"{where}: partial_rotary_factor is {partial!r}, but only 1.0 is supported here")
    kind = section.get("rope_type", section.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise CheckpointError(
            f"{where}: {name} has rope_type {kind!r}, but only 'default' and 'llama3' are supported here"
        )
    if unknown := sorted(set(section) - _OF_ROPE):
        raise CheckpointError(f"{where}: {name} has {unknown[0]} {section[unknown[0]]!r}, which is not supported here")
    if kind == "default":
        return None
    kinds = {item: int if item == "original_max_position_embeddings" else float for item in _ROPE_FIELDS}
    given = {item: Setting(item, kinds[item]).read(section, f"{where}: {name}") for item in _ROPE_FIELDS}
    try:
        return RopeScaling(**given)  # type: ignore[arg-type]
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
