"""How a run continues: which config keys may change, from which checkpoint, and which results are missing.

A checkpoint holds a position in a stream of windows, weights of a certain shape, and an optimizer whose settings
travel with its state. Keys that decide these are fixed when the run starts.

A new run can also start from another run's weights, when its model computes the same function of the same tokens:
sizes, the place of the experts and the tokenizer must agree. The number of active experts and everything about
training may change, since the optimizer and its schedule start over. It may also have experts that read embeddings in
layers where the run has none: they start at zero, so that the function is the same until they are trained.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Tokenizer
from torch import Tensor

from src.data.config import TokenizerConfig
from src.data.text_rule import TextRule
from src.data.tokenizer import fingerprint, load_run_rule, load_tokenizer
from src.errors import ConfigError, LutError, RunError, caused_by
from src.inference import load_model
from src.lut import read_manifest
from src.model import ModelConfig, Transformer
from src.model.transformer import parameter_part
from src.run_directory import EXPERTS_PREFIX, PlugIn, RunDirectory
from src.training.checkpoints import CheckpointFiles, linked, read_callback_state, read_weights
from src.training.config import OptimizerConfig

_FIXED = {
    "name": "names the run's directory",
    "output_dir": "names the run's directory",
    "seed": "decided the weights that training began with",
    "init_from": "decided the weights that training began with",
    "model": "shapes the weights",
    "data": "decides which windows each step reads",
    "optimizer": "is part of the optimizer's state",
}
_FREE = {
    "model.gradient_checkpointing",
    "model.expert_execution",
    "data.micro_batch_size",
    "data.num_workers",
    "data.cache_dir",
    "data.validation_windows",
    "optimizer.gradient_clip_norm",
    "optimizer.schedule",
    "optimizer.min_learning_rate_ratio",
    "optimizer.warmup_steps",
    "optimizer.decay_steps",
}


@dataclass(frozen=True)
class Difference:
    """A config key whose value changed since the run started."""

    key: str
    before: object
    now: object

    @property
    def forbidden(self) -> str | None:
        """Why the key cannot change; None when it can."""
        if self.key in _FREE:
            return None
        if self.key == "checkpoint.ema_decay" and self.now is None:
            return "made the checkpoint hold averaged weights as the model's"
        parents = [self.key[:end] for end in range(len(self.key) + 1) if self.key[end : end + 1] in (".", "")]
        return next((_FIXED[parent] for parent in parents if parent in _FIXED), None)

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.now!r}"


def compare_configs(run: RunDirectory, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Return what differs between a run's config and the one to resume it with.

    Raises:
        ConfigError: naming each key that cannot change, and why.
    """
    differences = list(_differences(before, now))
    refused = [f"{item} ({item.key.split('.')[0]} {item.forbidden})" for item in differences if item.forbidden]
    if refused:
        raise ConfigError(
            f"{run.config_path}: a resumed run cannot change {'; '.join(refused)}; leave these keys as they are, or "
            "start a new run, with init_from to take over the weights"
        )
    return differences


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a fit should do and leave behind, as far as it decides how to resume it."""

    max_steps: int
    max_time: str | None
    strategy: str
    final_weights: str
    """`last` or `best`."""
    table: str | None
    """Precision of the lookup table; None where neither weights nor table are written."""
    evaluation: bool
    """Whether both forms are scored in the end."""


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """Where a run continues, and what is left to do."""

    run: RunDirectory
    checkpoint: Path
    step: int
    """Optimizer steps that the checkpoint holds."""
    corpus: str | None
    """Fingerprint of the corpus that the run was trained on; None where only rank 0 knows it."""
    missing: tuple[str, ...] | None
    """What a run without steps left lacks: `validation`, `weights`, `table`, `evaluation`; None if steps are left."""

    @classmethod
    def plan(cls, run: RunDirectory, wanted: Wanted) -> Self:
        """Choose the newest checkpoint of `run`, and find out what is missing when it holds the last step.

        Raises:
            RunError: there is no checkpoint, `trainer.strategy` cannot load it, or the run does not know its corpus.
        """
        newest = CheckpointFiles(run.checkpoints_path).newest()
        if newest is None:
            raise RunError(
                f"{run.checkpoints_path}: holds no checkpoint, so there is nothing to resume; start a new run, and "
                "set checkpoint.every_steps to have one sooner"
            )
        if newest.is_dir() and wanted.strategy != "fsdp2":
            raise RunError(
                f"{newest}: holds one part per device, which trainer.strategy {wanted.strategy} cannot load; resume "
                f"with trainer.strategy=fsdp2, or write its weights with `python -m src.reparameterize --run {run.path}"
                " --checkpoint last` and start a new run from them with init_from"
            )
        corpus = run.recorded_corpus("fingerprint")
        if corpus is None:
            raise RunError(
                f"{run.report_path}: missing, or records no corpus, so what the run was trained on is unknown; copy "
                "the file from where the run was made, or start a new run with init_from"
            )
        step = CheckpointFiles.step(newest)
        missing = _missing_results(run, wanted, newest) if _is_trained(run, wanted, step) else None
        return cls(run=run, checkpoint=newest, step=step, corpus=corpus, missing=missing)

    @classmethod
    def of_rank_zero(cls, run: RunDirectory) -> Self:
        """Continue from the checkpoint that rank 0 chooses and broadcasts, since this rank sees none."""
        return cls(run=run, checkpoint=run.checkpoints_path / "last.ckpt", step=0, corpus=None, missing=None)

    def require_corpus(self, found: str) -> None:
        """Raise RunError if the corpus with the fingerprint `found` is not the one that the run started with."""
        if self.corpus is not None and found != self.corpus:
            raise RunError(
                f"{self.run.path}: was trained on corpus {self.corpus[:12]}, but data now gives {found[:12]}; restore "
                "the files of data, or start a new run with init_from"
            )


def _is_trained(run: RunDirectory, wanted: Wanted, step: int) -> bool:
    """Whether no step is left: all were taken, or a fit reported them that trainer.max_time ended."""
    trainer = run.config_values().get("trainer")
    same_time = isinstance(trainer, Mapping) and trainer.get("max_time") == wanted.max_time
    return step >= wanted.max_steps or (wanted.max_time is not None and same_time and run.record().get("steps") == step)


def _missing_results(run: RunDirectory, wanted: Wanted, newest: Path) -> tuple[str, ...]:
    """Return which results of the run's last step do not exist, by comparing identities of weights."""
    has_table = wanted.table is not None and run.model_config().architecture == "mole"
    if read_callback_state(newest, "CheckpointCallback").get("validation_pending"):  # the others come after it
        results = {"weights": wanted.table is not None, "table": has_table, "evaluation": wanted.evaluation}
        return ("validation", *(name for name, is_wanted in results.items() if is_wanted))
    missing: list[str] = []
    if wanted.table is not None:
        best = linked(run.checkpoints_path / "best.ckpt")
        final = best if wanted.final_weights == "best" and best.exists() else newest
        identity = run.identify(read_weights(final))
        if not run.holds_weights(identity, with_experts=has_table):
            missing.append("weights")
        if has_table and not holds_table(run.lut_path(), identity.training_form, wanted.table):
            missing.append("table")
    if wanted.evaluation:
        record = run.record()
        table = record.get("table")
        precision = table.get("precision") if isinstance(table, dict) else None
        is_reported = record.get("steps") == CheckpointFiles.step(newest) and "evaluation" in record
        if not is_reported or "weights" in missing or precision != (wanted.table if has_table else None):
            missing.append("evaluation")
    return tuple(missing)


def holds_table(lut_dir: Path, training_form: str, precision: str) -> bool:
    """Whether the directory holds a finished table of these weights in this precision."""
    with suppress(LutError):
        manifest = read_manifest(lut_dir)
        return (manifest.training_form, manifest.layout.precision) == (training_form, precision)
    return False


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[Difference]:
    for key, value in now.items():
        earlier = before.get(key)
        if isinstance(value, Mapping) and isinstance(earlier, Mapping):
            yield from _differences(earlier, value, f"{prefix}{key}.")
        elif value != earlier:
            yield Difference(prefix + key, earlier, value)


_MUST_AGREE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "num_experts",
    "expert_intermediate_size",
    "expert_input",
    "expert_permutation",
    "shared_expert_row",
    "expert_layers",
    "null_expert",
    "expert_ids",
    "activation",
    "rope_theta",
    "rope_scaling",
    "attention_bias",
    "qk_norm",
    "tie_embeddings",
    "norm_eps",
)


_OF_EXPERTS = frozenset({name for name in _MUST_AGREE if "expert" in name})


def _may_differ(theirs: ModelConfig, ours: ModelConfig) -> frozenset[str]:
    """Return the keys in which a model may differ that has experts in more layers than the run."""
    adds = ours.architecture == "mole" and set(theirs.mixture_layers) < set(ours.mixture_layers)
    if not adds or theirs.architecture == "moe":
        return frozenset()
    return _OF_EXPERTS if theirs.architecture == "dense" else frozenset({"expert_layers"})


def start_from_run(model: Transformer, run: RunDirectory, tokenizer: Tokenizer) -> None:
    """Copy the training form of `run` into `model`, which trains on text of `tokenizer`.

    In layers where the run has no experts, what the model's experts return and their routers' logits are zero.

    Raises:
        RunError: the run has no training form, its model has another shape, or its tokenizer is another one.
    """
    require_start(run, model.config)
    _require_same_tokenizer(run, tokenizer)
    if model.embedding.weight.is_meta:  # rank 0 distributes its weights
        return
    with load_model(run.path, experts="ffn") as trained, torch.no_grad():
        weights = _moved_experts(trained.state_dict(), trained.config, model.config)
        for name in model.load_state_dict(weights, strict=False).missing_keys:
            if name.endswith("down") or parameter_part(name) == "routers":
                model.state_dict()[name].zero_()


def _moved_experts(weights: Mapping[str, Tensor], theirs: ModelConfig, ours: ModelConfig) -> dict[str, Tensor]:
    """Name the experts of each layer as in a model that has some in more layers."""
    moved = dict[str, Tensor]()
    for name, tensor in weights.items():
        if name.startswith(EXPERTS_PREFIX):
            place, _, rest = name.removeprefix(EXPERTS_PREFIX).partition(".")
            name = f"{EXPERTS_PREFIX}{ours.mixture_layers.index(theirs.mixture_layers[int(place)])}.{rest}"
        moved[name] = tensor
    return moved


def plugs_into(run: RunDirectory, optimizer: OptimizerConfig) -> PlugIn | None:
    """Return the base of a run that starts from `run`; None where it will hold all of its weights."""
    if optimizer.trains_backbone:
        return None
    if run.model_config().architecture == "dense":
        return PlugIn(base=str(run.path.absolute()), backbone=run.identity().backbone)
    return run.plug_in()


def require_start(run: RunDirectory, config: ModelConfig) -> None:
    """Raise RunError where `run` has no training form, or one of another shape than `config`."""
    with caused_by("init_from"):
        _require_same_model(run.require(), config)
        _require_training_form(run)


def _require_same_model(run: RunDirectory, config: ModelConfig) -> None:
    theirs, ours = _resolved(run.model_config()), _resolved(config)
    free = _may_differ(run.model_config(), config)
    differences = [
        f"model.{key} {theirs[key]} there, {ours[key]} here"
        for key in _MUST_AGREE
        if theirs[key] != ours[key] and key not in free
    ]
    if differences:
        raise RunError(
            f"init_from: {run.path} holds another model ({'; '.join(differences)}); "
            "set these keys to the run's values, or start from a run of this shape"
        )


def _resolved(config: ModelConfig) -> dict[str, object]:
    return {**config.to_dict(), "num_kv_heads": config.kv_heads, "head_dim": config.attention_head_dim}


def starting_rule(
    init_from: str | None, tokenizer: TokenizerConfig, resumed: RunDirectory | None = None
) -> TextRule | None:
    """Return the rule of the run that training starts from, where it takes over the run's tokenizer; None elsewhere.

    An imported model has learned what stands before a text. A `resumed` run has its rule already.
    """
    if init_from is None:
        return None
    run = resumed or RunDirectory(Path(init_from))
    own = run.tokenizer_path
    taken_over = tokenizer.path is not None and Path(tokenizer.path).absolute() == own.absolute()
    if not own.is_file() or (resumed is None and (not taken_over or tokenizer.separator is not None)):
        return None
    return load_run_rule(own, run.recorded_tokenizers(), run.text_rule())


def _require_training_form(run: RunDirectory) -> None:
    if run.model_config().architecture == "mole" and not run.experts_path.is_file():
        raise RunError(
            f"init_from: {run.experts_path} is missing, so this run holds only its lookup form, which cannot be "
            "trained; start from a run that still has its experts"
        )


def _require_same_tokenizer(run: RunDirectory, tokenizer: Tokenizer) -> None:
    if not run.tokenizer_path.is_file():  # an import without one: nothing to compare with
        return
    found, expected = fingerprint(tokenizer), fingerprint(load_tokenizer(run.tokenizer_path))
    if found != expected:
        raise RunError(
            f"init_from: {run.path} was trained with tokenizer {expected[:12]}, but data uses {found[:12]}; "
            f"set data.tokenizer.path={run.tokenizer_path}"
        )
