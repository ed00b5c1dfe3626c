"""Every architecture against the oracle in plain loops: logits and the gradient of every parameter, float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from src.model import ModelConfig, Transformer
from src.model.transformer import Block
from tests.model.models import CONFIGS, MOE, build, token_ids
from tests.reference import reference_logits


def parity(model: Transformer, ids: Tensor) -> None:
    """Compare logits, and all gradients of a random weighting of them."""
    weighting = torch.randn(*ids.shape, model.config.vocab_size, dtype=torch.float64)
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.named_parameters()}
    expected = reference_logits(weights | dict(model.named_buffers()), model.config, ids)
    found = model(ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    (found * weighting).sum().backward()
    gradients = torch.autograd.grad((expected * weighting).sum(), list(weights.values()), materialize_grads=True)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-10, atol=1e-10, msg=lambda text, at=name: at + text
        )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_and_gradients_equal_the_oracle(config: ModelConfig, checkpointing: bool) -> None:
    config = replace(config, gradient_checkpointing=checkpointing)
    ids = token_ids(config)
    assert len(ids.unique()) < ids.numel(), "some ids must repeat"
    parity(build(config), ids)


@pytest.mark.parametrize("shared", [0, 12], ids=["", "shared"])
def test_an_expert_without_tokens_changes_nothing_and_gets_a_zero_gradient(shared: int) -> None:
    model = build(replace(MOE, intermediate_size=shared))
    ids = token_ids(MOE, batch_size=1, length=6)  # fewer tokens than dimensions, so that `starve` has a solution
    starve(model, ids, expert=1)
    parity(model, ids)
    for block in blocks(model):
        assert block.hidden_experts is not None
        for weight in (block.hidden_experts.up, block.hidden_experts.down):
            assert weight.grad is not None
            assert weight.grad[1].abs().max() == 0
            assert weight.grad.abs().max() > 0


def blocks(model: Transformer) -> list[Block]:
    """Return the blocks with their type."""
    return [block for block in model.blocks if isinstance(block, Block)]


@torch.no_grad()
def starve(model: Transformer, ids: Tensor, expert: int) -> None:
    """Make the router of each layer give `expert` the lowest logit for every one of these tokens."""
    for layer, block in enumerate(blocks(model)):
        assert block.router is not None
        seen: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Tensor, into: list[Tensor] = seen) -> None:
            into.append(output)

        handle = block.ffn_norm.register_forward_hook(keep)
        model(ids)
        handle.remove()
        hidden_states = seen[0].flatten(0, 1)  # (N, D)
        wanted = torch.full((len(hidden_states), 1), -100.0, dtype=torch.float64)
        block.router.weight[expert] = torch.linalg.lstsq(hidden_states, wanted).solution[:, 0]
        logits = model.trunk(ids).router_logits[layer]
        assert (logits.argmin(-1) == expert).all(), "the test needs an expert that nobody chooses"


@pytest.mark.parametrize("execution", ["unique", "per_token"])
def test_both_executions_agree_when_ids_repeat(execution: str) -> None:
    config = replace(CONFIGS["mole"], expert_execution=execution)
    parity(build(config), torch.full((2, 4), 5))


def test_top_k_of_all_experts_is_full_activation() -> None:
    full, chosen = build(CONFIGS["moe-full"]), build(replace(CONFIGS["moe-full"], top_k=4))
    ids = token_ids(full.config)
    torch.testing.assert_close(chosen(ids), full(ids), rtol=0, atol=1e-12)
