"""Under bf16 autocast, running experts once per id must cost no more gradient accuracy than once per position.

On the trained model and real text, since frequent tokens are what makes the difference: the row of a token that
occurs hundreds of times collects hundreds of gradients.
"""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from src.config import load_run_config
from src.data.packed_tokens import prepare_corpus, training_windows
from src.model import Transformer
from src.model.loss import next_token_loss
from src.run_directory import RunDirectory
from src.train import RunResult

GROUPS = ("embedding", "attention", "shared_expert", "router", "experts", "head", "norm")
BATCHES = 8


def group_of(name: str) -> str:
    return next(group for group in ("norm", "experts.", *GROUPS) if group in name).rstrip(".")


def gradients(model: Transformer, windows: Tensor, *, bf16: bool) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden_states = model.hidden_states(windows[:, :-1])
        next_token_loss(hidden_states, model.head, windows[:, 1:]).backward()
    found: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found.setdefault(group_of(name), []).append(parameter.grad.flatten().clone())
    return {group: torch.cat(parts) for group, parts in found.items()}


def test_unique_ids_keep_gradient_accuracy_under_autocast(trained: RunResult) -> None:
    run = RunDirectory(trained.run_dir)
    config = load_run_config(run)
    corpus = prepare_corpus(config.data)
    weights = {**load_file(run.backbone_path), **load_file(run.experts_path)}

    def model(execution: Literal["unique", "per_token"]) -> Transformer:
        built = Transformer(replace(config.model, expert_execution=execution))
        built.load_state_dict(weights)
        return built

    unique, per_token = model("unique"), model("per_token")
    ratios: dict[str, list[float]] = {}
    for batch in range(BATCHES):
        samples = np.arange(batch * 64, (batch + 1) * 64, dtype=np.int64)
        windows = training_windows(corpus.tokens("train"), config.data.sequence_length, samples, seed=1)
        exact = gradients(unique, windows, bf16=False)
        errors = [
            {group: float((found[group] - exact[group]).norm()) for group in exact}
            for found in (gradients(unique, windows, bf16=True), gradients(per_token, windows, bf16=True))
        ]
        for group in exact:
            ratios.setdefault(group, []).append(errors[0][group] / errors[1][group])
    means = {group: sum(values) / len(values) for group, values in ratios.items()}
    assert means == pytest.approx(means)  # no NaN
    assert max(means.values()) <= 1.15, means
