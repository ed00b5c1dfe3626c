"""Scores and comparisons against plain loops."""

import math
import zlib

import pytest
import torch
from torch import Tensor

from src.evaluation.equivalence import compare_greedy, logit_distance, permuted_rows, zeroed_rows
from src.evaluation.perplexity import RowsOf, summarize, window_losses, zlib_bits_per_byte
from src.model import ModelConfig, Transformer
from src.model.attention import document_mask
from src.training.routing_metrics import RoutingMetrics

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    intermediate_size=32,
    num_experts=3,
    expert_intermediate_size=24,
    max_sequence_length=64,
)


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def test_a_score_is_the_mean_over_tokens_and_bytes_are_those_of_the_targets(model: Transformer) -> None:
    windows = torch.randint(50, (5, 9))
    lengths = torch.arange(50)
    score = summarize(window_losses(model, windows, batch_size=2), windows, lengths)
    total, size = 0.0, 0
    for window in windows:
        log_probs = model(window[None, :-1]).log_softmax(-1)[0]
        for position, target in enumerate(window[1:].tolist()):
            total -= float(log_probs[position, target])
            size += target
    assert score.loss == pytest.approx(total / 40, rel=1e-5)
    assert (score.tokens, score.bytes) == (40, size)
    assert score.bits_per_byte == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(total / 40), rel=1e-4)


def test_documents_kept_apart_are_scored_as_if_alone(model: Transformer) -> None:
    windows = torch.tensor([[5, 6, 0, 7, 8, 9, 3]])
    losses = window_losses(model, windows, mask=lambda token_ids: document_mask(token_ids, 0))
    for first, last in ((0, 3), (3, 6)):
        alone = window_losses(model, windows[:, first : last + 1])
        torch.testing.assert_close(losses[:, first:last], alone)
    assert not torch.allclose(losses, window_losses(model, windows))


def test_zlib_is_zlib() -> None:
    assert zlib_bits_per_byte("abc" * 100) == 8 * len(zlib.compress(b"abc" * 100, 9)) / 300


def test_logit_distance_sees_one_changed_weight(model: Transformer) -> None:
    other = Transformer(CONFIG).eval()
    other.load_state_dict(model.state_dict())
    windows = torch.randint(50, (3, 8))
    same = logit_distance(model, other, windows)
    assert (same.max_abs, same.top1_agreement, same.tokens) == (0, 1, 24)
    with torch.no_grad():
        other.head.weight[7, 3] += 0.5
    moved = logit_distance(model, other, windows)
    hidden = model.hidden_states(windows)[..., 3].abs()
    assert moved.max_abs == pytest.approx(0.5 * float(hidden.max()), rel=1e-4)
    assert moved.mean_abs == pytest.approx(0.5 * float(hidden.mean()) / 50, rel=1e-4)


def test_greedy_comparison_tells_near_ties_from_differences(model: Transformer) -> None:
    other = Transformer(CONFIG).eval()
    other.load_state_dict(model.state_dict())
    prompts = torch.randint(50, (4, 5))
    assert compare_greedy(model, other, prompts, new_tokens=6).identical == 4
    with torch.no_grad():
        other.head.weight.copy_(other.head.weight.roll(1, 0))
    result = compare_greedy(model, other, prompts, new_tokens=6)
    assert not result.holds
    assert result.widest_gap > 1e-4


def test_controls_change_the_rows_that_are_mixed(model: Transformer) -> None:
    windows = torch.randint(50, (3, 8))

    def logits(rows_of: RowsOf) -> Tensor:
        return model.head(model.trunk(windows, expert_rows=rows_of(windows)).hidden_states)

    zeroed, permuted = logits(zeroed_rows(model)), logits(permuted_rows(model))
    for altered in (zeroed, permuted):
        assert (altered - model(windows)).abs().max() > 1e-2
    without = Transformer(CONFIG, with_experts=True).eval()
    without.load_state_dict({n: t * (0 if n.endswith("experts.down") else 1) for n, t in model.state_dict().items()})
    torch.testing.assert_close(zeroed, without(windows))
    distance = logit_distance(model, model, windows, rows_of=zeroed_rows(model))
    assert distance.max_abs == pytest.approx(float((zeroed - model(windows)).abs().max()), rel=1e-4)


def test_routing_metrics_average_over_updates_and_layers() -> None:
    metrics = RoutingMetrics(range(2), 3, top_k=None)
    certain = torch.tensor([50.0, 0, 0]).expand(1, 4, 3)
    undecided = torch.zeros(1, 4, 3)
    metrics.update([certain, undecided])
    metrics.update([certain, undecided])
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert values["router/entropy/layer_0"] == pytest.approx(0, abs=1e-6)
    assert values["router/entropy/layer_1"] == pytest.approx(math.log(3))
    assert values["router/entropy"] == pytest.approx(math.log(3) / 2)
    assert values["router/load_balance_loss/layer_0"] == pytest.approx(3)
    assert values["router/load_balance_loss/layer_1"] == pytest.approx(1)
    assert values["router/max_share/layer_0"] == pytest.approx(1)
    assert values["router/max_share/layer_1"] == pytest.approx(1 / 3)
    assert values["router/z_loss/layer_1"] == pytest.approx(math.log(3) ** 2)
    assert values["router/max_share"] == pytest.approx(1)
    assert len(values) == 4 * (2 + 1)
