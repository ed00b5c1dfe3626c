"""Rows shared by all micro-batches of a step give the gradients of rows computed for each of them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from src.model import ModelConfig, Transformer
from src.model.experts import EmbeddingExperts
from src.model.loss import next_token_loss
from src.model.step_rows import StepRows

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    intermediate_size=24,
    num_experts=3,
    expert_intermediate_size=20,
    max_sequence_length=16,
    expert_execution="unique_per_step",
)


def gradients(model: Transformer, batch: Tensor, *, shared: bool) -> dict[str, Tensor]:
    model.zero_grad()
    rows = StepRows(model, batch[..., :-1]) if shared else None
    for index, windows in enumerate(batch):
        expert_rows = rows.micro_batch(index) if rows is not None else None
        hidden_states = model.trunk(windows[:, :-1], expert_rows=expert_rows).hidden_states
        objective = next_token_loss(hidden_states, model.head, windows[:, 1:]) / len(batch)
        if rows is not None and index + 1 == len(batch):
            objective = objective + rows.carried()
        objective.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIG).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
@pytest.mark.parametrize("top_k", [None, 2])
def test_gradients_agree(model: Transformer, micro_batches: int, top_k: int | None) -> None:
    other = Transformer(replace(CONFIG, top_k=top_k)).double()
    other.load_state_dict(model.state_dict())
    batch = torch.randint(40, (micro_batches, 3, 9))
    expected, found = gradients(other, batch, shared=False), gradients(other, batch, shared=True)
    assert found.keys() == expected.keys() == dict(other.named_parameters()).keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-10, rtol=0)


def test_experts_run_once_per_step(model: Transformer) -> None:
    seen: list[int] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        seen.append(len(inputs[0]))

    assert isinstance(model.experts, EmbeddingExperts)
    model.experts[0].register_forward_hook(note)
    batch = torch.randint(40, (4, 3, 9))
    gradients(model, batch, shared=True)
    assert seen == [batch[..., :-1].unique().numel()]
