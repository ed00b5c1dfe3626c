"""A run directory: the paths of its files, its record, and its weights.

`backbone.safetensors` and `experts.safetensors` together are the training form. Their metadata holds identities,
SHA-256 over names, dtypes, shapes and bytes, so that a table can say which weights it was built from. `report.json` is
the run's record: facts from its start (corpus, code, W&B id), and scores once it is done. Knows nothing of training: an
imported or copied directory is a run too.

A plug-in is a run that left the weights of another one, its base, as they are. It holds routers and experts, or a
table, and config.yaml names the base. Its identities are those of all weights, the base's included.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from src.errors import RunError
from src.model.config import ModelConfig
from src.model.transformer import parameter_part
from src.system.files import atomic_path, expand_home, write_json, write_text

SCHEMA_VERSION = 1
TEXT_RULE = "text_rule"
"""Key of config.yaml for how the run encodes text; like the version, it is no setting."""
PLUG_IN = "plug_in"
"""Key of config.yaml for the base that a run plugs into; no setting either."""
EXPERTS_PREFIX = "experts."
PATH_KEYS = {"output_dir", "cache_dir", "files", "path", "init_from", "local_data"}
"""Keys of a config, in any section, whose values are paths on this machine."""
PATH_OR_NAME_KEYS = {"hub"}
"""Keys whose values are names or folders."""


@dataclass(frozen=True)
class Identity:
    """Which weights: hashes of the backbone and of the whole training form (backbone + experts)."""

    backbone: str
    training_form: str


@dataclass(frozen=True)
class PlugIn:
    """The base of a run that holds routers and experts alone."""

    base: str
    """Where its run directory was."""
    backbone: str
    """Identity of its weights."""


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run and what can be read from them; creating one touches nothing on disk."""

    path: Path
    base_path: Path | None = None
    """The run that this one plugs into, where that is not the path in config.yaml."""

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer; absent after an import without one."""
        return self.path / "tokenizer.json"

    @property
    def backbone_path(self) -> Path:
        """All weights but embedding experts and their norms."""
        return self.path / "backbone.safetensors"

    @property
    def experts_path(self) -> Path:
        """Embedding experts and their norms; not needed for lookup."""
        return self.path / "experts.safetensors"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report_path(self) -> Path:
        """The record, which the final report completes."""
        return self.path / "report.json"

    @property
    def held_out_path(self) -> Path:
        """Held-out windows, token counts of the training text, and what else scoring needs."""
        return self.path / "held_out.safetensors"

    @property
    def scores_path(self) -> Path:
        """The final scores, document by document."""
        return self.path / "scores.json"

    def lut_path(self, name: str = "lut") -> Path:
        return self.path / expand_home(name)

    def require(self) -> "RunDirectory":
        """Return self, or raise RunError when this is no run directory."""
        if not self.path.is_dir():
            raise RunError(f"{self.path}: no such run directory; `python -m src.train` makes one under runs/")
        if not self.config_path.is_file():
            raise RunError(f"{self.path}: holds no config.yaml, so it is not a run directory")
        return self

    def config_values(self) -> dict[str, object]:
        """Read config.yaml as plain values, without its `schema_version`, which is checked."""
        try:
            values = yaml.safe_load(self.require().config_path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise RunError(f"{self.config_path}: not valid YAML ({error})") from error
        found = values.pop("schema_version", None) if isinstance(values, dict) else None
        if found != SCHEMA_VERSION:
            raise RunError(
                f"{self.config_path}: schema_version {found}, but this version reads {SCHEMA_VERSION}; "
                "was the run made by another version?"
            )
        return values

    def model_config(self) -> ModelConfig:
        section = self.config_values().get("model")
        if not isinstance(section, Mapping):
            raise RunError(f"{self.config_path}: no `model` section")
        return ModelConfig.from_dict(section, str(self.config_path))

    def record(self) -> dict[str, Any]:
        """Read the record; empty in a directory without one, such as an import."""
        return read_json(self.report_path) if self.report_path.is_file() else {}

    def update_record(self, values: Mapping[str, Any]) -> None:
        """Merge `values` into the record, written whole or not at all."""
        write_json(self.report_path, {**self.record(), **values})

    def recorded_corpus(self, fact: str) -> str | None:
        """Return the training corpus' `fingerprint`, or that of its `tokenizer`; None where none is recorded."""
        corpus = self.record().get("corpus")
        value = corpus.get(fact) if isinstance(corpus, dict) else None
        return value if isinstance(value, str) else None

    def recorded_tokenizers(self) -> dict[str, str]:
        """Return the fingerprints of the tokenizers of model and tables, by where they are recorded."""
        found = {f"{self.path} (as its {self.report_path.name} says)": self.recorded_corpus("tokenizer")}
        for path in sorted(self.path.glob("*/manifest.json")):
            with suppress(RunError):  # opening the table reports what is wrong with it
                found[str(path.parent)] = read_json(path).get("tokenizer")
        return {where: value for where, value in found.items() if isinstance(value, str)}

    def text_rule(self) -> Mapping[str, Any] | None:
        """Return what stands before and after texts, and what separates them, as tokens.

        Empty in a run that was trained before this was recorded; None in such an import.
        """
        record = self.config_values().get(TEXT_RULE)
        if record is None:
            return None if self.recorded_corpus("fingerprint") is None else {}
        if not isinstance(record, Mapping):
            raise RunError(
                f"{self.config_path}: {TEXT_RULE} is {record!r}, expected tokens by place; copy the run again"
            )
        return record

    def plug_in(self) -> PlugIn | None:
        """Return what the run plugs into; None for a run that holds all of its weights."""
        return read_plug_in(self.config_values(), str(self.config_path))

    def base(self) -> "RunDirectory | None":
        """Return the run whose weights this one plugs into; None for a run that holds all of its weights.

        RunError where it is not found, or has other weights.
        """
        if (plug_in := self.plug_in()) is None:
            return None
        base = RunDirectory(self.base_path or Path(plug_in.base))
        if not base.backbone_path.is_file():
            raise RunError(
                f"{self.path}: plugs into the run {plug_in.base}, but {base.path} holds no weights; put that run "
                "there, or say where it is with --base (in Python: base=)"
            )
        self.require_base(base.path, base.identity())
        return base

    def require_base(self, path: Path, identity: Identity) -> None:
        """Raise RunError if this run does not plug into the model of that identity, which `path` holds."""
        plug_in = self.plug_in()
        if plug_in is None:
            raise RunError(f"{self.path}: holds all of its weights, so it is no plug-in; load it by itself")
        if plug_in.backbone != identity.backbone:
            raise RunError(
                f"{self.path}: plugs into the run {plug_in.base} (backbone {plug_in.backbone[:12]}), but {path} has "
                f"other weights (backbone {identity.backbone[:12]}); take the run that it was trained on"
            )

    def write_config(
        self,
        values: Mapping[str, object],
        text_rule: Mapping[str, Any] | None = None,
        plug_in: PlugIn | None = None,
    ) -> None:
        """Write config.yaml from plain values, with absolute paths: a verb may run in another directory."""
        records = {} if text_rule is None else {TEXT_RULE: dict(text_rule)}
        records |= {} if plug_in is None else {PLUG_IN: asdict(plug_in)}
        document = {"schema_version": SCHEMA_VERSION, **records, **absolute_paths(values)}
        write_text(self.config_path, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))

    def backbone_weights(self) -> dict[str, Tensor]:
        """Read all weights but embedding experts and their norms, those of a base included."""
        base = self.base()
        return {**({} if base is None else base.backbone_weights()), **read_tensors(self.backbone_path)}

    def identify(self, weights: Mapping[str, Tensor]) -> Identity:
        """Compute the identity of a training form's state dict; of a plug-in's, only routers and experts count."""
        base = self.base()
        return identify_weights(weights if base is None else {**base.backbone_weights(), **added_weights(weights)})

    def write_weights(self, weights: Mapping[str, Tensor]) -> Identity:
        """Write a training form's state dict as backbone and experts, each whole or not at all; no base's weights."""
        identity = self.identify(weights)
        backbone, experts = _split(weights if self.plug_in() is None else added_weights(weights))
        if experts:
            write_tensors(self.experts_path, experts, {"format": "pt", "training_form": identity.training_form})
        self.write_backbone(backbone, identity)
        return identity

    def write_backbone(self, backbone: Mapping[str, Tensor], identity: Identity) -> None:
        """Write the weights of a lookup form; `identity` says which training form it belongs to."""
        metadata = {"format": "pt", "training_form": identity.training_form, "backbone": identity.backbone}
        write_tensors(self.backbone_path, backbone, metadata)

    def holds_weights(self, identity: Identity, *, with_experts: bool) -> bool:
        """Whether the weight files are readable and claim this identity."""
        paths = [self.backbone_path, self.experts_path] if with_experts else [self.backbone_path]
        with suppress(RunError):
            return all(read_metadata(path).get("training_form") == identity.training_form for path in paths)
        return False

    def identity(self) -> Identity:
        """Read the identity that `backbone.safetensors` claims."""
        metadata = read_metadata(self.backbone_path)
        try:
            return Identity(metadata["backbone"], metadata["training_form"])
        except KeyError as error:
            raise RunError(
                f"{self.backbone_path}: no {error} identity in its metadata; it was not written here"
            ) from error


def map_paths(values: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Return a config's values with every path changed."""
    return {key: _map_path(key, value, change) for key, value in values.items()}


def _map_path(key: str, value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, Mapping):
        return map_paths(value, change)
    if isinstance(value, list):
        return [_map_path(key, item, change) for item in value]
    is_path = isinstance(value, str) and (key in PATH_KEYS or (key in PATH_OR_NAME_KEYS and _is_path(value)))
    return change(value) if is_path else value


def _is_path(value: str) -> bool:
    return value.startswith((".", "~", os.sep)) or Path(value).exists()


def absolute_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's values with paths that mean the same in every working directory."""
    return map_paths(values, lambda path: os.path.abspath(os.path.expanduser(path)))  # noqa: PTH100, PTH111 - patterns


def read_plug_in(values: Mapping[str, Any], where: str) -> PlugIn | None:
    """Return what a config says that it plugs into; None for one with all of its weights, RunError if unreadable."""
    record = values.get(PLUG_IN)
    if record is None:
        return None
    try:
        return PlugIn(**record)
    except TypeError as error:
        raise RunError(f"{where}: {PLUG_IN} is {record!r}, expected base and backbone; copy the run again") from error


def added_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a plug-in adds to its base: routers, experts and their norms."""
    return {name: tensor for name, tensor in weights.items() if parameter_part(name) in ("routers", "experts")}


def identify_weights(weights: Mapping[str, Tensor]) -> Identity:
    """Compute the identity of a training form's state dict."""
    return identify(*_split(weights))


def _split(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return backbone and experts."""
    experts = {name: tensor for name, tensor in weights.items() if name.startswith(EXPERTS_PREFIX)}
    return {name: tensor for name, tensor in weights.items() if name not in experts}, experts


def identify(backbone: Mapping[str, Tensor], experts: Mapping[str, Tensor]) -> Identity:
    """Compute the identity of weights; the training form's hash covers both parts, so either can be checked alone."""
    backbone_hash, experts_hash = hash_weights(backbone.items()), hash_weights(experts.items())
    return Identity(backbone_hash, hashlib.sha256(f"{backbone_hash} {experts_hash}".encode()).hexdigest())


def hash_weights(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over name, dtype, shape and bytes of each tensor, in order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; RunError names the file when it is missing or damaged."""
    if not path.is_file():
        raise RunError(f"{path}: missing; was the training of this run interrupted before its end?")
    try:
        with safe_open(path, framework="pt") as handle:
            return dict(handle.metadata() or {})
    except SafetensorError as error:
        raise _damaged(path, error) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; RunError names the file when it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, error) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata=metadata)


def _damaged(path: Path, error: SafetensorError) -> RunError:
    return RunError(f"{path}: not a readable safetensors file ({error}); copy or write it again")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a run; RunError names the file when it is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not readable JSON ({error}); copy the run again") from error
    if not isinstance(values, dict):
        raise RunError(f"{path}: holds a JSON {type(values).__name__}, expected an object; copy the run again")
    return values
