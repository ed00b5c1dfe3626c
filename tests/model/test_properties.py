"""What must hold of every model: causality, caching, padding, rows without context, a gradient everywhere."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from src.inference import generate, generation
from src.inference.generation import left_pad
from src.model import KeyValueCache, ModelConfig, attention
from src.model.experts import HiddenExperts, mix
from src.model.router import Router, Routing
from tests.model.models import ARCHITECTURES, CONFIGS, MOLE, build, token_ids

architectures = pytest.mark.parametrize("config", [CONFIGS[name] for name in ARCHITECTURES], ids=ARCHITECTURES)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def new_cache(config: ModelConfig, batch_size: int, max_tokens: int, *, static: bool = False) -> KeyValueCache:
    device = torch.device("cpu")
    return KeyValueCache(config, batch_size, max_tokens, device=device, dtype=torch.float64, static=static)


@architectures
def test_logits_ignore_later_tokens(config: ModelConfig) -> None:
    model, ids = build(config), token_ids(config, length=9)
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % config.vocab_size
    close(model(changed)[:, :5], model(ids)[:, :5])
    assert (model(changed)[:, 5] - model(ids)[:, 5]).abs().max() > 1e-3


@architectures
@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 5], [3, 1, 4, 1], [9]], ids=str)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(config: ModelConfig, chunks: list[int], static: bool) -> None:
    model, ids = build(config), token_ids(config, length=9)
    cache = new_cache(config, len(ids), 12 if static else 9, static=static)
    close(torch.cat([model(chunk, cache=cache) for chunk in ids.split(chunks, dim=1)], dim=1), model(ids))
    assert cache.length == 9


@torch.no_grad()
def test_generation_from_a_cache_whose_length_is_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = build(MOLE), [[5, 3, 1, 7, 2], [4, 4]]
    ids, mask = left_pad(prompts)
    expected = generate(model, ids, max_new_tokens=6, attention_mask=mask, prefill_chunk_tokens=2)
    shapes = set[tuple[int, ...]]()

    class StaticCache(KeyValueCache):
        def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            shapes.add((found := super().append(layer, keys, values))[0].shape)
            return found

    monkeypatch.setattr(generation, "KeyValueCache", partial(StaticCache, static=True))
    found = generate(model, ids, max_new_tokens=6, attention_mask=mask, prefill_chunk_tokens=2)
    assert torch.equal(found, expected)
    assert len(shapes) == 1  # of every step, with a prompt's chunks too


@torch.no_grad()
def test_a_full_cache_names_its_size() -> None:
    model, ids = build(MOLE), token_ids(MOLE, length=9)
    with pytest.raises(ValueError, match="the key-value cache holds 8 tokens, but 9 were fed"):
        model(ids, cache=new_cache(MOLE, 2, 8))


@architectures
@torch.no_grad()
def test_left_padding_equals_unpadded(config: ModelConfig) -> None:
    model, ids = build(config), token_ids(config, batch_size=1, length=6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], dim=1)
    attention_mask = torch.tensor([[False] * 3 + [True] * 6])
    close(model(padded, attention_mask=attention_mask)[:, 3:], model(ids))


@architectures
@torch.no_grad()
def test_left_padding_holds_in_cached_decoding(config: ModelConfig) -> None:
    model = build(config)
    long, short = token_ids(config, batch_size=1, length=8), token_ids(config, batch_size=1, length=5, seed=1)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 3, dtype=torch.int64), short], dim=1)])
    attention_mask = torch.ones(2, 8, dtype=torch.bool)
    attention_mask[1, :3] = False
    cache = new_cache(config, 2, 8)
    steps = [model(ids[:, :5], cache=cache, attention_mask=attention_mask[:, :5])]
    steps += [model(ids[:, t : t + 1], cache=cache, attention_mask=attention_mask[:, : t + 1]) for t in range(5, 8)]
    logits = torch.cat(steps, dim=1)
    close(logits[:1], model(long))
    close(logits[1:, 3:], model(short))


@pytest.mark.parametrize("heads_at_once", [1, 3, 5])
@torch.no_grad()
def test_bfloat16_decoding_stays_near_float64(monkeypatch: pytest.MonkeyPatch, heads_at_once: int) -> None:
    max_tokens, ids = 12, token_ids(MOLE, batch_size=5, length=9)
    head_bytes = 4 * max_tokens * MOLE.attention_head_dim
    monkeypatch.setattr(attention, "FLOAT_COPY_BYTES", heads_at_once * head_bytes)
    attention_mask = torch.ones(5, 9, dtype=torch.bool)
    attention_mask[3, :4] = False
    exact, model = build(MOLE).bfloat16().double(), build(MOLE).bfloat16()
    cache = KeyValueCache(MOLE, 5, max_tokens, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert cache.scratch.nbytes == heads_at_once * head_bytes
    assert not len(new_cache(MOLE, 5, max_tokens).scratch)
    model(ids[:, :5], cache=cache, attention_mask=attention_mask[:, :5])
    steps = [model(ids[:, t : t + 1], cache=cache, attention_mask=attention_mask[:, : t + 1]) for t in range(5, 9)]
    expected = exact(ids, attention_mask=attention_mask)[:, 5:]
    error = (torch.cat(steps, dim=1).double() - expected).abs().max() / expected.abs().max()
    assert error < 0.01


@pytest.mark.parametrize("fast", [True, False], ids=["sums", "products"])
@pytest.mark.parametrize("kv_heads", [1, 2, 6], ids=lambda heads: f"{6 // heads} queries a head")
@torch.no_grad()
def test_one_bfloat16_token_attends_with_no_error_but_that_of_its_result(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, fast: bool
) -> None:
    if fast and not attention.SUMS_FAST:
        pytest.skip("this torch has no vector code for sums of bfloat16 rows")
    monkeypatch.setattr(attention, "SUMS_FAST", fast)
    config = replace(CONFIGS["dense"], hidden_size=96, num_heads=6, num_kv_heads=kv_heads)
    cache = KeyValueCache(config, 3, 40, device=torch.device("cpu"), dtype=torch.bfloat16)
    for tensor in (cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)):  # what lies behind must stay unseen
        tensor[..., :33, :] = torch.randn(tensor[..., :33, :].shape, generator=torch.Generator().manual_seed(0))
    query = torch.randn(3, 6, 1, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    mask = torch.ones(3, 1, 1, 33, dtype=torch.bool)
    mask[1, ..., :20] = False
    for layer, seen in ((0, None), (1, mask)):
        key, value = cache.keys[layer, ..., :33, :], cache.values[layer, ..., :33, :]
        found = attention._attend_one(query, key, value, seen, cache, layer)
        heads = (tensor.double().repeat_interleave(6 // kv_heads, dim=1) for tensor in (key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(query.double(), *heads, attn_mask=seen)
        half_unit, of_weights = expected.abs() / 256, value.abs().max() / 2**17
        assert ((found.double() - expected).abs() <= half_unit + of_weights).all()


@torch.no_grad()
def test_a_mask_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 6\), expected .* = \(2, 7\)"):
        build(MOLE)(token_ids(MOLE), attention_mask=torch.ones(2, 6, dtype=torch.bool))


@torch.no_grad()
def test_rows_depend_on_the_id_alone() -> None:
    model = build(MOLE)
    assert model.experts is not None
    every_id = torch.arange(MOLE.vocab_size)
    some_ids = torch.tensor([7, 2, 7])
    whole = model.experts.rows(every_id, model.embedding(every_id))
    some = model.experts.rows(some_ids, model.embedding(some_ids))
    for layer in range(MOLE.num_layers):
        close(some(layer), whole(layer)[some_ids])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_parameter_gets_a_gradient_under_bfloat16_autocast(config: ModelConfig, checkpointing: bool) -> None:
    model = build(replace(config, gradient_checkpointing=checkpointing), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trunk = model.trunk(token_ids(config))
        loss = model.head(trunk.hidden_states).float().square().mean()
    assert trunk.hidden_states.isfinite().all()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if config.top_k != 1 or "router" not in name:  # the weight of a single choice is always 1
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", ["moe", "moe-full", "mole"])
def test_bfloat16_autocast_stays_near_float32(name: str) -> None:
    model, ids = build(CONFIGS[name], torch.float32), token_ids(CONFIGS[name])
    with torch.no_grad():
        expected = model(ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(ids)
    assert (found.float() - expected).abs().mean() < 0.02 * expected.abs().mean()


def test_checkpointing_changes_no_gradient() -> None:
    for name in ARCHITECTURES:
        plain, recomputed = build(CONFIGS[name]), build(replace(CONFIGS[name], gradient_checkpointing=True))
        for model in (plain, recomputed):
            model(token_ids(CONFIGS[name])).square().mean().backward()
        for (_, a), (_, b) in zip(plain.named_parameters(), recomputed.named_parameters(), strict=True):
            assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("expert_major", [True, False])
@pytest.mark.parametrize("experts", [None, torch.tensor([[[1, 0], [2, 1]], [[0, 2], [2, 0]]])], ids=["full", "top2"])
def test_mix_gradients(expert_major: bool, experts: Tensor | None) -> None:
    inverse = torch.tensor([[1, 0], [1, 1]])
    weights = torch.rand(2, 2, 3 if experts is None else 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn((3, 2, 5) if expert_major else (2, 3, 5), dtype=torch.float64, requires_grad=True)

    def mixed(rows: Tensor, weights: Tensor) -> Tensor:
        by_id = rows.transpose(0, 1) if expert_major else rows  # (U, E, D)
        return mix(by_id, Routing(weights, weights, experts), inverse)

    assert torch.autograd.gradcheck(mixed, (rows, weights))


def test_a_frequent_rows_gradient_survives_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    inverse = torch.zeros(2, 1000, dtype=torch.int64)  # one id holds every position
    weights = torch.rand(2, 1000, 2, generator=generator)
    outgoing = torch.randn(2, 1000, 8, generator=generator) + 1
    rows = torch.randn(2, 1, 8, generator=generator).bfloat16().requires_grad_()  # (E, U, D)
    mix(rows.transpose(0, 1), Routing(weights, weights, None), inverse).backward(outgoing)
    expected = torch.einsum("bte,btd->ed", weights.double(), outgoing.double())
    assert rows.grad is not None
    error = (rows.grad[:, 0].double() - expected).abs() / expected.abs()
    assert error.max() <= 2**-8, "only the last rounding to bfloat16 may show, not the sum of 2,000 terms"


@pytest.mark.parametrize("top_k", [None, 2])
def test_hidden_experts_gradients(top_k: int | None) -> None:
    torch.manual_seed(0)
    module, router = HiddenExperts(3, 4, 5).double(), Router(4, 3, top_k).double()
    for parameter in (*module.parameters(), *router.parameters()):
        torch.nn.init.normal_(parameter)
    hidden_states = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)

    def mixture(hidden_states: Tensor) -> Tensor:
        return module.mixture(hidden_states, router(hidden_states))

    assert torch.autograd.gradcheck(mixture, (hidden_states,))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_output_projections_start_smaller(name: str) -> None:
    sizes = {"hidden_size": 64, "num_layers": 8, "init_std": 0.02, "vocab_size": 64}
    config = replace(CONFIGS[name], **sizes)
    for parameter_name, parameter in build(config, torch.float32).named_parameters():
        if parameter.dim() > 1:
            writes_to_stream = parameter_name.endswith(("out.weight", "down.weight", ".down"))
            expected = 0.02 / (4 if writes_to_stream else 1)
            assert parameter.std().item() == pytest.approx(expected, rel=0.2), parameter_name
