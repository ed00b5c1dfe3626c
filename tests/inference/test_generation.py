"""Generation: the same text from every form, reader, cache, chunk and batch; sampling as it says."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from src.evaluation.perplexity import Share
from src.evaluation.routing_view import view_routing
from src.inference import InferenceModel, generate, left_pad, load_model, stream
from src.inference.generation import Sampler, Sampling, truncated_probs
from src.lut.readers import READERS
from src.model.sharding import shard_model
from tests.inference.runs import prompts, write_run

ROOT = str(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def trained_form(run: Path) -> InferenceModel:
    return load_model(run, experts="ffn")


@pytest.fixture(scope="module")
def model(run: Path) -> Iterator[InferenceModel]:
    with load_model(run, experts="lut") as opened:
        yield opened


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("cache_mb", [0, 0.02])
def test_every_reader_and_cache_writes_the_text_of_the_training_form(
    run: Path, trained_form: InferenceModel, reader: str, cache_mb: float
) -> None:
    token_ids = prompts(3, 20)
    expected = generate(trained_form, token_ids, max_new_tokens=24)
    with load_model(run, experts="lut", reader=reader, cache_mb=cache_mb) as model:
        for chunk in (1, 7, 512):
            assert torch.equal(generate(model, token_ids, max_new_tokens=24, prefill_chunk_tokens=chunk), expected)


def test_cached_decoding_picks_what_the_full_forward_would(model: InferenceModel) -> None:
    token_ids = generate(model, prompts(4, 9), max_new_tokens=30)
    with torch.no_grad():
        best = model(token_ids).argmax(dim=-1)
    assert torch.equal(best[:, 8:-1], token_ids[:, 9:])


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 15), min_size=1, max_size=5), seed=st.integers(0, 99), chunk=st.integers(1, 16))
def test_a_batch_of_different_lengths_writes_what_each_prompt_alone_would(
    model: InferenceModel, lengths: list[int], seed: int, chunk: int
) -> None:
    alone = [prompts(1, length, seed + index) for index, length in enumerate(lengths)]
    token_ids, mask = left_pad([prompt[0].tolist() for prompt in alone])
    for temperature in (0.0, 1.0):
        batch = generate(
            model,
            token_ids,
            max_new_tokens=12,
            temperature=temperature,
            seed=seed,
            attention_mask=mask,
            prefill_chunk_tokens=chunk,
        )
        for index, prompt in enumerate(alone):  # row i draws as a batch of its own with seed + i
            single = generate(model, prompt, max_new_tokens=12, temperature=temperature, seed=seed + index)
            assert torch.equal(batch[index, -12:], single[0, -12:])


def test_bfloat16_decoding_of_padded_prompts_follows_the_mask(run: Path) -> None:
    with load_model(run, dtype=torch.bfloat16) as model, torch.no_grad():
        token_ids, mask = left_pad([[5, 6, 7], [8]])
        assert torch.equal(
            generate(model, token_ids, max_new_tokens=1, attention_mask=mask)[1:, -1:],
            generate(model, token_ids[1:, 2:], max_new_tokens=1)[:, -1:],
        )


def test_streamed_ids_are_the_callers_to_change(model: InferenceModel) -> None:
    token_ids, steps = prompts(2, 6), list[torch.Tensor]()
    for next_ids in stream(model, token_ids, max_new_tokens=5):
        steps.append(next_ids.clone())
        next_ids.zero_()
    assert torch.equal(torch.stack(steps, dim=1), generate(model, token_ids, max_new_tokens=5)[:, 6:])


def test_stop_ids_end_a_sequence_and_are_repeated_until_the_others_end(model: InferenceModel) -> None:
    token_ids = prompts(2, 6)
    free = generate(model, token_ids, max_new_tokens=20)
    stop = int(free[0, 9])
    stopped = generate(model, token_ids, max_new_tokens=20, stop_ids=[stop])
    first = int((free[0, 6:] == stop).nonzero()[0]) + 6
    assert torch.equal(stopped[0, : first + 1], free[0, : first + 1])
    assert stopped[0, first:].eq(stop).all()
    alone = generate(model, token_ids[:1], max_new_tokens=20, stop_ids=[stop])
    assert alone.shape == (1, first + 1)


def test_a_prompt_longer_than_the_context_is_refused_or_windowed(model: InferenceModel) -> None:
    token_ids = prompts(1, 80)
    with pytest.raises(ValueError, match=r"prompt \(80 tokens\) and max_new_tokens \(10\) exceed .* \(64\)"):
        generate(model, token_ids, max_new_tokens=10)
    windowed = generate(model, token_ids, max_new_tokens=10, overflow="window")
    assert torch.equal(windowed[:, :80], token_ids)
    assert torch.equal(windowed[:, 80:], generate(model, token_ids[:, -54:], max_new_tokens=10)[:, 54:])
    with pytest.raises(ValueError, match="exceed"):
        generate(model, token_ids, max_new_tokens=64, overflow="window")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"prefill_chunk_tokens": 0}, "prefill_chunk_tokens is 0"),
        ({"attention_mask": torch.tensor([[True, False]])}, "pad left"),
    ],
)
def test_arguments_out_of_range_are_named(model: InferenceModel, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, torch.tensor([[1, 2]]), max_new_tokens=1, **arguments)  # type: ignore[arg-type]


def test_an_empty_prompt_is_refused(model: InferenceModel) -> None:
    with pytest.raises(ValueError, match="empty"):
        generate(model, torch.empty(1, 0, dtype=torch.int64), max_new_tokens=1)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        left_pad([[1], []])


def test_two_streams_on_one_model_do_not_disturb_each_other(model: InferenceModel) -> None:
    one, other = prompts(1, 8, 1), prompts(1, 8, 2)
    together = list(zip(stream(model, one, max_new_tokens=12), stream(model, other, max_new_tokens=12), strict=True))
    for index, token_ids in enumerate((one, other)):
        expected = generate(model, token_ids, max_new_tokens=12)[0, 8:]
        assert torch.equal(torch.cat([pair[index] for pair in together]), expected)


def test_a_sharded_model_shows_its_routing_and_generates(trained_form: InferenceModel, tmp_path: Path) -> None:
    token_ids = prompts(2, 6)
    expected = generate(trained_form, token_ids, max_new_tokens=5)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        model = copy.deepcopy(trained_form)
        shard_model(model, init_device_mesh("cpu", (1,)))
        view = view_routing(model, token_ids, batch_size=2, share=Share())
        assert view is not None and view.contributions is not None
        assert torch.equal(generate(model, token_ids, max_new_tokens=5), expected)
    finally:
        torch.distributed.destroy_process_group()


def run_python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ROOT})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_stream_that_is_not_read_to_its_end_is_closed_silently_at_exit(run: Path) -> None:
    code = """
import sys, torch
from src.inference import load_model, stream
model = load_model(sys.argv[1], experts="lut")
steps = stream(model, torch.tensor([[1, 2, 3]]), max_new_tokens=20)
print(len(next(steps)))
"""
    assert run_python(code, str(run)) == "1\n"


def test_inference_brings_in_nothing_of_training_or_text() -> None:
    unwanted = ("lightning", "matplotlib", "wandb", "omegaconf", "datasets", "tokenizers", "src.data")
    code = f"import sys, src.inference; print([name for name in {unwanted} if name in sys.modules])"
    assert run_python(code) == "[]\n"


def test_samples_are_distributed_as_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]]).expand(20_000, 5)
    sampling = Sampling(temperature=0.7, seed=3)
    drawn = torch.bincount(Sampler(sampling, 20_000)(logits), minlength=5) / 20_000
    expected = (logits[0] / 0.7).softmax(-1)
    assert torch.allclose(drawn, expected, atol=0.012)
    assert drawn[4] == 0


@settings(deadline=None)
@given(
    logits=st.lists(st.integers(-20, 20).map(lambda quarters: quarters / 4), min_size=3, max_size=12, unique=True),
    top_k=st.integers(1, 12),
    top_p=st.floats(0.05, 1.0),
)
def test_truncation_keeps_the_most_likely_ids(logits: list[float], top_k: int, top_p: float) -> None:
    whole = torch.tensor([logits]).softmax(-1)[0]
    by_k = truncated_probs(torch.tensor([logits]), Sampling(temperature=1.0, top_k=top_k))[0]
    assert set(by_k.nonzero().flatten().tolist()) == set(whole.topk(min(top_k, len(logits))).indices.tolist())
    by_p = truncated_probs(torch.tensor([logits]), Sampling(temperature=1.0, top_p=top_p))[0]
    kept = int(by_p.count_nonzero())
    ranked = whole.sort(descending=True).values
    assert ranked[: kept - 1].sum() < top_p + 1e-6
    assert ranked[:kept].sum() >= top_p - 1e-5


@torch.no_grad()
def test_wide_routers_change_no_logit(tmp_path: Path) -> None:
    with load_model(write_run(tmp_path / "run"), dtype=torch.bfloat16) as model:
        weights = {name: tensor for name, tensor in model.state_dict().items() if "router" in name}
        assert weights and {tensor.dtype for tensor in weights.values()} == {torch.float32}
        wide = model(prompts(2, 9))
        torch.testing.assert_close(model.bfloat16()(prompts(2, 9)), wide, rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0])
def test_temperatures_that_are_none_are_refused(model: InferenceModel, temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature is {temperature}, but it must be finite and at least 0"):
        generate(model, prompts(1, 3), max_new_tokens=2, temperature=temperature)


@pytest.mark.parametrize("temperature", [1e-7, 1e-38, 5e-324])
def test_tiny_temperatures_are_greedy(model: InferenceModel, temperature: float) -> None:
    greedy = generate(model, prompts(2, 9), max_new_tokens=8)
    assert torch.equal(generate(model, prompts(2, 9), max_new_tokens=8, temperature=temperature, seed=3), greedy)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_ids_that_the_tokenizer_lacks_are_never_taken(model: InferenceModel, temperature: float) -> None:
    free = generate(model, prompts(4, 9), max_new_tokens=20, temperature=temperature, seed=0)
    limit = int(free[:, 9:].max())
    bounded = generate(model, prompts(4, 9), max_new_tokens=20, temperature=temperature, seed=0, num_ids=limit)
    assert int(bounded[:, 9:].max()) < limit
    with pytest.raises(ValueError, match="num_ids is 0"):
        generate(model, prompts(1, 3), max_new_tokens=2, num_ids=0)
