"""Whether a run may go on under another config: what differs, and what must not.

A checkpoint holds a position in a stream of windows, weights of a certain shape, and an optimiser whose settings
travel with its state. Keys that decide these are fixed when the run begins.

Starts a model from another run's weights. Knows nothing of optimisers: the schedule begins anew.

A run can begin from another when its model means the same function of the same tokens: sizes, the place of the
experts and the tokenizer must agree. How many experts are active, and everything about training, may change.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from src.data.tokenizer import fingerprint, load_tokenizer
from src.errors import ConfigError, RunError
from src.inference import load_model
from src.model import ModelConfig, Transformer
from src.run_directory import RunDirectory
from src.training.checkpoints import CheckpointFiles

_FIXED = {
    "name": "names the run's directory",
    "output_dir": "names the run's directory",
    "seed": "decided the weights that training began with",
    "init_from": "decided the weights that training began with",
    "model": "shapes the weights",
    "data": "decides which windows each step reads",
    "optimizer": "is part of the optimiser's state",
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
    """A key whose value is not the one that the run was started with."""

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
        """Describe the change on one line."""
        return f"{self.key}: {self.before!r} -> {self.now!r}"


def compare_configs(run: RunDirectory, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Return what differs between a run's config and the one it shall go on with.

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


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on."""

    run: RunDirectory
    checkpoint: Path
    step: int
    """Optimiser steps that the checkpoint holds."""

    @classmethod
    def plan(cls, run: RunDirectory, *, max_steps: int, strategy: str, corpus: str) -> "Resumption":
        """Choose the newest checkpoint of `run`, which trains to `max_steps` on the corpus of that fingerprint.

        Raises:
            RunError: there is no checkpoint, no step is left, `trainer.strategy` cannot load it, or the corpus is not
                the one that the run began with.
        """
        newest = CheckpointFiles(run.checkpoints_path).newest()
        if newest is None:
            raise RunError(
                f"{run.checkpoints_path}: holds no checkpoint, so there is nothing to resume; start the run anew, and "
                "set checkpoint.every_steps to have one sooner"
            )
        step = CheckpointFiles.step(newest)
        if step >= max_steps:
            raise RunError(
                f"{run.path}: has finished its {step} steps; write its weights and table with `python -m "
                f"src.reparameterize --run {run.path} --checkpoint last`, or train longer with trainer.max_steps "
                f"above {step}"
            )
        if newest.is_dir() and strategy != "fsdp2":
            raise RunError(
                f"{newest}: holds one part per device, which trainer.strategy {strategy} cannot load; resume with "
                f"trainer.strategy=fsdp2, or write its weights with `python -m src.reparameterize --run {run.path} "
                "--checkpoint last` and start a new run from them with init_from"
            )
        _require_same_corpus(run, corpus)
        return cls(run, newest, step)


def _require_same_corpus(run: RunDirectory, found: str) -> None:
    expected = run.recorded_corpus("fingerprint")
    if expected is None:
        raise RunError(
            f"{run.report_path}: missing, or records no corpus, so what the run was trained on is unknown; copy the "
            "file from where the run was made, or start a new run with init_from"
        )
    if found != expected:
        raise RunError(
            f"{run.path}: was trained on corpus {expected[:12]}, but data now gives {found[:12]}; restore the files of "
            "data, or start a new run with init_from"
        )


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
    "intermediate_size",
    "num_experts",
    "expert_intermediate_size",
    "expert_input",
    "rope_theta",
    "norm_eps",
)


def start_from_run(model: Transformer, run: RunDirectory, tokenizer: Tokenizer) -> None:
    """Copy the training form of `run` into `model`, which trains on text of `tokenizer`.

    Raises:
        RunError: the run has no training form, its model has another shape, or its tokenizer is another one.
    """
    _require_same_model(run.require(), model.config)
    _require_training_form(run)
    _require_same_tokenizer(run, tokenizer)
    with load_model(run.path, experts="ffn") as trained:
        model.load_state_dict(trained.state_dict())


def _require_same_model(run: RunDirectory, config: ModelConfig) -> None:
    theirs, ours = run.model_config().to_dict(), config.to_dict()
    differences = [
        f"model.{key} {theirs[key]} there, {ours[key]} here" for key in _MUST_AGREE if theirs[key] != ours[key]
    ]
    if differences:
        raise RunError(
            f"init_from: {run.path} holds another model ({'; '.join(differences)}); "
            "set these keys to the run's values, or start from a run of this shape"
        )


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
