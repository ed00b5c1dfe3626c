"""The models that a decode benchmark compares, and how a step or a prompt of each is timed.

B batch.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from src.benchmarks import page_cache
from src.benchmarks.rounds import Timings, run_rounds
from src.benchmarks.text_ids import TextIds
from src.cli import progress_bar
from src.inference import InferenceModel, load_model
from src.inference.disk_experts import DiskExperts
from src.inference.generation import PREFILL_CHUNK_POSITIONS, PREFILL_CHUNK_TOKENS, prefetch, prefill
from src.lut import read_manifest
from src.model import KeyValueCache
from src.model.products import linear

PROMPT_TOKENS = 512
CACHED_ROWS = 1024
MATMULS = "its matmuls alone"
CACHED = f"disk + {CACHED_ROWS} rows"


class Contenders:
    """Models of one backbone that differ in where expert rows come from."""

    def __init__(self, stack: ExitStack, mole: Path, dense: Path) -> None:
        """Load them; the caller's stack closes them."""
        row_mb = read_manifest(mole / "lut").row_bytes / 2**20
        self.lut_dir = mole / "lut"
        self.models: dict[str, InferenceModel] = {"dense": stack.enter_context(load_model(dense))}
        self.models["experts computed"] = stack.enter_context(load_model(mole, experts="ffn"))
        for name, reader, cache_mb in (
            ("table in RAM", "memory", 0.0),
            ("disk, warm", "auto", 0.0),
            ("disk, cold", "auto", 0.0),
            (CACHED, "auto", CACHED_ROWS * row_mb),
        ):
            model = stack.enter_context(load_model(mole, experts="lut", reader=reader, cache_mb=cache_mb))
            self.models[name] = model
        _share_backbone(self.models["dense"], list(self.models.values()))

    @property
    def hit_rate(self) -> float:
        """Of the row cache so far."""
        cached = self.models[CACHED].experts
        assert isinstance(cached, DiskExperts)
        return cached.store.stats.hit_rate

    def set_page_cache(self, name: str, token_ids: Tensor) -> None:
        """Drop the table's pages, or make those of `token_ids` resident; off the clock."""
        model = self.models[name]
        if name in ("disk, cold", CACHED):
            page_cache.drop(self.lut_dir)
        elif name == "disk, warm":
            assert isinstance(model.experts, DiskExperts)
            model.experts.store.gather(token_ids.unique())


def _share_backbone(dense: InferenceModel, models: Sequence[InferenceModel]) -> None:
    """Let every model use the same weights in memory, or the last one's would lie in the processor's cache."""
    weights = dense.state_dict(keep_vars=True)
    for model in models:
        model.load_state_dict(weights, strict=False, assign=True)


@torch.inference_mode()
def decode_step(model: InferenceModel, token_ids: Tensor, cache: KeyValueCache) -> float:
    """Take one step of (B,) sampled ids: request their rows, run the model, sample; return its seconds."""
    start = time.perf_counter()
    prefetch(model, token_ids)
    hidden_states = model.hidden_states(token_ids.unsqueeze(1), cache=cache)
    model.head(hidden_states[:, -1]).max(dim=-1)
    return time.perf_counter() - start


@torch.inference_mode()
def measure_decode(contenders: Contenders, text: TextIds, batch: int, rounds: int) -> Timings:
    """Time steps after a prompt; keys and values are random, and the same for all."""
    dense = contenders.models["dense"]
    cache = KeyValueCache(dense.config, batch, PROMPT_TOKENS + 1, device=torch.device("cpu"), dtype=torch.bfloat16)
    cache.keys.normal_()
    cache.values.normal_()
    steps = [text.distinct(batch) for _ in range(rounds + 2)]

    def timed(name: str, model: InferenceModel) -> Callable[[int], float]:
        def one(number: int) -> float:
            contenders.set_page_cache(name, steps[number])
            cache.length = PROMPT_TOKENS
            return decode_step(model, steps[number], cache)

        return one

    calls = {name: timed(name, model) for name, model in contenders.models.items()}
    calls[MATMULS] = matmuls_alone(dense, batch)
    for call in calls.values():  # fill buffers, choose kernels
        for number in (rounds, rounds + 1):
            call(number)
    with progress_bar(f"batch {batch}", rounds) as advance:
        return run_rounds(calls, rounds, advance)


@torch.inference_mode()
def measure_prefill(contenders: Contenders, text: TextIds, rounds: int) -> Timings:
    """Time a prompt of 512 tokens of running text, for one sequence."""
    prompts = [text.window(PROMPT_TOKENS).unsqueeze(0) for _ in range(rounds + 1)]
    chunk_tokens = min(PREFILL_CHUNK_TOKENS, PREFILL_CHUNK_POSITIONS)

    def timed(name: str, model: InferenceModel) -> Callable[[int], float]:
        @torch.inference_mode()
        def one(number: int) -> float:
            contenders.set_page_cache(name, prompts[number])
            device = torch.device("cpu")
            cache = KeyValueCache(model.config, 1, PROMPT_TOKENS, device=device, dtype=torch.bfloat16)
            start = time.perf_counter()
            prefill(model, prompts[number], cache, None, chunk_tokens)
            return time.perf_counter() - start

        return one

    calls = {name: timed(name, model) for name, model in contenders.models.items()}
    for call in calls.values():
        call(rounds)
    with progress_bar("prefill", rounds) as advance:
        return run_rounds(calls, rounds, advance)


def matmul_weights(dense: InferenceModel) -> list[Tensor]:
    """Return the weights of the model's matrix products: all matrices but the embedding."""
    return [weight for name, weight in dense.named_parameters() if weight.dim() == 2 and "embed" not in name]


def matmuls_alone(dense: InferenceModel, batch: int) -> Callable[[int], float]:
    """Return a call that times the model's products with its weights, and nothing else."""
    weights = matmul_weights(dense)
    inputs = {weight.shape[1]: torch.randn(batch, weight.shape[1], dtype=torch.bfloat16) for weight in weights}

    @torch.inference_mode()
    def call(_: int) -> float:
        start = time.perf_counter()
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)
        return time.perf_counter() - start

    return call


def read_bandwidth() -> float:
    """Return bytes per second that plain reads of memory reach: a sum over 512 MiB, the best of five."""
    values = torch.ones(2**26, dtype=torch.int64)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - start)
    return values.numel() * values.itemsize / best
