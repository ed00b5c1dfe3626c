"""Starts a model from another run's weights. Knows nothing of optimisers: the schedule begins anew.

A run can begin from another when its model means the same function of the same tokens: sizes, the place of the
experts and the tokenizer must agree. How many experts are active, and everything about training, may change.
"""

from tokenizers import Tokenizer

from src.data.tokenizer import fingerprint, load_tokenizer
from src.errors import RunError
from src.inference import load_model
from src.model import ModelConfig, Transformer
from src.run_directory import RunDirectory

_MUST_AGREE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "intermediate_size",
    "num_experts",
    "expert_intermediate_size",
    "expert_input",
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
