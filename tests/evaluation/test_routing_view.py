"""What the dashboard shows of the routers, against plain loops; and that a collapse is seen."""

import math
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch
from tokenizers import Tokenizer

from src.data.tokenizer import train_bpe
from src.evaluation.figures import entropy_lines, expert_token_rows, expert_tokens, probability_heat_map
from src.evaluation.perplexity import Share
from src.evaluation.routing_view import RoutingView, measure_token_weights, view_routing
from src.model import ModelConfig
from tests.model.models import CONFIGS, DENSE, MOE, build


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(iter(["one $x$ two_^ three\n\tfour 五 " * 9]), 320)


def view(probabilities: list[list[float]], vocab_size: int = 300) -> RoutingView:
    shares = torch.tensor(probabilities)
    ids = torch.arange(0, vocab_size, 3)
    contributions = torch.rand(len(ids), *shares.shape, generator=torch.Generator().manual_seed(0)) * shares
    entropy = torch.special.entr(shares).sum(-1)
    counts = torch.full((len(ids),), 5)
    return RoutingView(
        layers=tuple(range(len(shares))),
        probabilities=shares,
        entropy=entropy,
        token_ids=ids,
        counts=counts,
        contributions=contributions,
    )


@pytest.mark.parametrize("name", ["mole", "mole-top2", "mole-per-token"])
def test_contributions_are_norms_of_what_each_expert_adds(name: str) -> None:
    config: ModelConfig = replace(CONFIGS[name], vocab_size=13)
    model = build(config).eval()
    windows = torch.randint(13, (5, 9), generator=torch.Generator().manual_seed(1))
    found = view_routing(model, windows, batch_size=2, share=Share())
    assert found is not None and found.contributions is not None
    assert model.experts is not None
    trunk = model.trunk(windows)
    for layer in range(config.num_layers):
        sums, probs = torch.zeros(13, config.num_experts), torch.zeros(config.num_experts)
        for row, window in enumerate(windows.tolist()):
            for position, token_id in enumerate(window):
                logits = trunk.router_logits[layer][row, position]
                gate = logits.softmax(-1)
                probs += gate.detach()
                if config.top_k is not None:
                    kept = logits.topk(config.top_k).indices
                    gate = torch.zeros_like(gate).index_put((kept,), logits[kept].softmax(-1))
                one = torch.tensor([token_id])
                values = model.experts.rows(one, model.embedding(one))(layer)[0]  # (E, D)
                sums[token_id] += (gate.unsqueeze(-1) * values).norm(dim=-1).detach()
        counts = windows.flatten().bincount(minlength=13)
        assert found.token_ids.tolist() == counts.nonzero().flatten().tolist()
        expected = (sums / counts.clamp(min=1).unsqueeze(-1))[found.token_ids]
        torch.testing.assert_close(found.contributions[:, layer], expected, check_dtype=False)
        torch.testing.assert_close(found.probabilities[layer], probs / windows.numel(), check_dtype=False)


def test_token_weights_are_those_that_the_model_mixes_with() -> None:
    config = replace(CONFIGS["mole-top2"], vocab_size=13)
    model = build(config).eval()
    inputs = torch.randint(13, (4, 9), generator=torch.Generator().manual_seed(1))
    found = measure_token_weights(model, inputs, 5)
    assert found.shares is not None
    for layer, logits in enumerate(model.trunk(inputs).router_logits):
        kept = logits.topk(2).indices
        mixed = torch.zeros_like(logits).scatter(-1, kept, logits.gather(-1, kept).softmax(-1))
        torch.testing.assert_close(found.shares[layer], mixed[inputs == 5].mean(dim=0), check_dtype=False)


def test_models_without_a_table_show_what_there_is() -> None:
    windows = torch.randint(13, (2, 9))
    assert view_routing(build(DENSE).eval(), windows, batch_size=2, share=Share()) is None
    found = view_routing(build(MOE).eval(), windows, batch_size=2, share=Share())
    assert found is not None
    assert found.contributions is None
    assert found.top_tokens(0, 0, 5) == []


def test_effective_experts_count_those_that_take_part() -> None:
    found = view([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4])
    assert found.effective_experts.tolist() == pytest.approx([1, 2, 4])
    assert found.collapsed_layers == [0]
    assert found.metrics()["router/effective_experts_min"] == pytest.approx(1)


def test_top_tokens_are_frequent_and_ordered() -> None:
    found = view([[0.25] * 4])
    rare = replace(found, counts=torch.where(found.token_ids == found.top_tokens(0, 1, 1)[0][0], 1, 5))
    assert rare.top_tokens(0, 1, 3) == found.top_tokens(0, 1, 4)[1:]
    norms = [norm for _, norm in rare.top_tokens(0, 1, 9)]
    assert norms == sorted(norms, reverse=True)


def test_a_collapse_shows_in_the_picture(tmp_path: Path) -> None:
    def picture(probabilities: list[list[float]]) -> tuple[str, float]:
        figure = probability_heat_map(view(probabilities), step=100)
        figure.savefig(tmp_path / "map.png")
        pixels = matplotlib.image.imread(tmp_path / "map.png")[..., :3]
        yellow = (pixels[..., 0] > 0.9) & (pixels[..., 1] > 0.8) & (pixels[..., 2] < 0.3)  # the bright end of viridis
        return figure.axes[0].get_title(), float(yellow.mean())

    title, bright = picture([[0.97, 0.01, 0.01, 0.01], [0.2, 0.3, 0.3, 0.2]])
    assert "COLLAPSED to about one expert: layer 0" in title
    assert bright > 0.03
    title, none = picture([[0.25] * 4, [0.2, 0.3, 0.3, 0.2]])
    assert "no layer has collapsed" in title
    assert none < bright / 3  # of the color bar itself


def test_pictures_of_any_size_and_text_can_be_drawn(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for num_layers, num_experts in ((1, 2), (24, 16)):
        found = view([[1 / num_experts] * num_experts] * num_layers, vocab_size=tokenizer.get_vocab_size())
        history = [(step, found.entropy.tolist()) for step in (10, 20)]
        for index, figure in enumerate(
            (
                probability_heat_map(found, 20),
                entropy_lines(history, found.layers, num_experts),
                expert_tokens(found, tokenizer, 20),
            )
        ):
            figure.savefig(tmp_path / f"{index}.png")
            height, width, _ = matplotlib.image.imread(tmp_path / f"{index}.png").shape
            assert 100 < height < 2000
            assert 200 < width < 2500
        rows = expert_token_rows(found, tokenizer, count=3)
        assert len(rows) == 3 * num_layers * num_experts
        assert all(str(row[3]).isprintable() and math.isfinite(float(row[4])) for row in rows)
