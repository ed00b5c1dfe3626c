"""MoE as contenders of `src.benchmarks.decode`: all experts in memory, or on disk (`src.benchmarks.offload`).

What stays in memory depends on the tokens before. So these contenders are fed consecutive tokens of real text after a
prompt of the same text, all of them the same: not their own samples, since random weights fall into loops. Choices of
experts are those of random weights, which are almost even, or those of a trained model (`src.benchmarks.routing`).

B batch, S tokens.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from src.benchmarks import workload
from src.benchmarks.common import Target, Timings
from src.benchmarks.lookup import RawReads
from src.benchmarks.offload import (
    PIECE_BYTES,
    ExtentReader,
    KeepFew,
    KeepRecent,
    Load,
    OffloadedExperts,
    OffloadedLayer,
    Policy,
    uniform_loads,
    write_experts,
)
from src.benchmarks.routing import RecordedRouter, Replay, RoutingTrace
from src.benchmarks.workload import PROMPT_TOKENS, TextIds, decode_step
from src.inference.generation import PREFILL_CHUNK_POSITIONS, PREFILL_CHUNK_TOKENS
from src.lut import read_manifest
from src.model import KeyValueCache, ModelConfig, Transformer
from src.model.experts import HiddenExperts
from src.model.router import Router
from src.model.transformer import Block

EXPERTS = {4: 10, 16: 34}
"""Experts of the paper's MoE by those of the MoLE that has as many trained parameters."""
PAPER_BYTES_PER_SECOND = 16e9
"""From which the paper estimates what loading takes (arXiv:2503.15798, Figure 3)."""
RAW_EVERY = 2
"""Steps from one whose extents are read again by bare threads to the next."""
MEMORY, RESIDENT = "MoE in memory", "MoE on disk, all resident"
FEW, RECENT = "MoE on disk, two kept", "MoE on disk, LRU"
RECORDED = ", recorded"


def moe_config(mole: ModelConfig) -> ModelConfig:
    """Return the paper's MoE of the size of a MoLE model: two experts of half the width are active."""
    return replace(
        mole,
        intermediate_size=0,
        num_experts=EXPERTS[mole.num_experts],
        expert_intermediate_size=mole.expert_intermediate_size // 2,
        expert_input="hidden",
        top_k=2,
    )


def share_parts(model: Transformer, other: Transformer) -> None:
    """Let `model` use the parts of `other` that both have, or the last one's would be in the processor's cache."""
    model.embedding, model.norm, model.head = other.embedding, other.norm, other.head
    for block, shared in zip(model.blocks, other.blocks, strict=True):
        for name, part in shared.named_children():
            if getattr(block, name) is not None:
                block.add_module(name, part)


def sharing(other: Transformer, config: ModelConfig) -> Transformer:
    """Return a model of `config` with the parts of `other`, and what that lacks on the meta device."""
    with torch.device("meta"):
        model = Transformer(config, with_experts=False)
    share_parts(model, other)
    return model.eval().requires_grad_(False)


def blocks_of(model: Transformer) -> list[Block]:
    """Return the blocks with their type."""
    return [block for block in model.blocks if isinstance(block, Block)]


def experts_of(model: Transformer) -> list[HiddenExperts]:
    """Return the experts of an MoE, layer by layer."""
    return [block.hidden_experts for block in blocks_of(model) if block.hidden_experts is not None]


@torch.no_grad()
def random_moe(dense: Transformer, config: ModelConfig, seed: int = 0) -> Transformer:
    """Return an MoE with the parts of `dense`, random routers in float32 and random experts in the dtype of `dense`."""
    generator, std = torch.Generator().manual_seed(seed), config.init_std
    model, dtype = sharing(dense, config), dense.embedding.weight.dtype
    for block in blocks_of(model):
        block.router = Router(config.hidden_size, config.num_experts, config.top_k)
        block.hidden_experts = HiddenExperts(
            config.num_experts, config.hidden_size, config.expert_intermediate_size, config.activation
        ).to(dtype)
        for weight in (block.router.weight, *block.hidden_experts.weights):
            weight.normal_(0, std, generator=generator)
    return model.requires_grad_(False)


def memory_left(mole: Transformer, moe: Transformer) -> int:
    """Return the bytes that `mole` without its table holds in memory above `moe` without its experts."""
    experts = sum(weight.nbytes for layer in experts_of(moe) for weight in layer.weights)
    used = [sum(weight.nbytes for weight in model.parameters()) for model in (mole, moe)]
    return max(0, used[0] - (used[1] - experts))


@dataclass(frozen=True, kw_only=True)
class OffloadReport:
    """What a contender read per step."""

    experts_per_layer: float
    """Loaded in a step, a mean."""
    uniform: float
    """The same as the paper counts it, from even routing and two experts kept."""
    step_bytes: float
    reading_ms: float
    """From the request of a layer's experts to the arrival of the last one, over all layers; a median."""
    paper_ms: float
    """What the paper estimates for these bytes."""
    over_raw: float | None
    """Reading, over bare O_DIRECT reads of the same extents in the same groups; the median of paired ratios."""
    memory_mb: float
    """Of the buffers of experts."""


@dataclass
class Session:
    """Text of a batch that some contenders are fed, and the keys and values that all of them write alike."""

    tokens: Tensor
    """(B, S)."""
    cache: KeyValueCache
    replay: Replay | None

    def go_to(self, position: int) -> None:
        """Let the next forward pass begin at `position`."""
        self.cache.length = position
        if self.replay is not None:
            self.replay.position = position

    @torch.inference_mode()
    def read_prompt(self, model: Transformer) -> None:
        chunk = max(1, min(PREFILL_CHUNK_TOKENS, PREFILL_CHUNK_POSITIONS // len(self.tokens)))
        for start in range(0, PROMPT_TOKENS, chunk):
            self.go_to(start)
            model.trunk(self.tokens[:, start : min(PROMPT_TOKENS, start + chunk)], cache=self.cache)


@dataclass
class Fed:
    """A contender that is fed text, and what it read in each step of a batch size."""

    model: Transformer
    is_recorded: bool
    offloaded: OffloadedExperts | None = None
    is_cold: bool = False
    steps: list[tuple[int, float, float | None]] = field(default_factory=list[tuple[int, float, float | None]])
    """Experts, seconds of reading, and seconds of reading them again by bare threads."""


class MoeContenders:
    """Models of one MoE that differ in where its experts are."""

    def __init__(
        self,
        stack: ExitStack,
        dense: Transformer,
        mole: Transformer,
        directory: Path,
        trace: RoutingTrace | None,
        *,
        only_cold: bool = False,
    ) -> None:
        """Write the experts to `directory`; the caller's stack closes them.

        With `only_cold` there are no contenders that read through the page cache or keep every expert.
        """
        self.config, self._directory, self._stack = moe_config(mole.config), directory, stack
        memory = random_moe(dense, self.config)
        self._layers = experts_of(memory)
        write_experts(directory, self._layers)
        self.expert_bytes = sum(weight[0].nbytes for weight in self._layers[0].weights)
        self.capacity = memory_left(mole, memory) // self.expert_bytes
        """Experts that the LRU keeps: as many bytes as MoLE has in memory above this MoE's backbone."""
        self._raw = self._raw_reads()
        self._trace = trace if trace is not None and trace.num_experts == self.config.num_experts else None
        self.contenders = {MEMORY: Fed(memory, is_recorded=False)}
        if not only_cold:
            every = KeepRecent(len(self._layers) * self.config.num_experts)
            self._add(RESIDENT, every, memory, is_cold=False).load_everything()
        for is_cold in (True,) if only_cold else (True, False):
            self._add_policies(memory, is_cold=is_cold)
        if self._trace is not None:
            self._follower = sharing(memory, self.config)
            for layer, block in enumerate(blocks_of(self._follower)):
                assert block.router is not None
                block.add_module("router", RecordedRouter(block.router, layer))
            self._add_policies(self._follower, is_cold=True)

    def _add_policies(self, model: Transformer, *, is_cold: bool) -> None:
        suffix = f"{', cold' if is_cold else ', warm'}{'' if model is self.contenders[MEMORY].model else RECORDED}"
        self._add(FEW + suffix, KeepFew(), model, is_cold=is_cold)
        self._add(RECENT + suffix, KeepRecent(self.capacity), model, is_cold=is_cold)

    def _add(self, name: str, policy: Policy, like: Transformer, *, is_cold: bool) -> OffloadedExperts:
        reader = ExtentReader(self._directory, direct=is_cold and self._raw is not None)
        self._stack.callback(reader.close)
        offloaded, model = OffloadedExperts(reader, self._layers, policy), sharing(like, self.config)
        for layer, block in enumerate(blocks_of(model)):
            block.hidden_experts = OffloadedLayer(self._layers[layer], offloaded, layer)
        is_recorded = like is not self.contenders[MEMORY].model
        self.contenders[name] = Fed(model, is_recorded, offloaded, is_cold)
        return offloaded

    def _raw_reads(self) -> RawReads | None:
        """Return bare reads past the page cache; None where the system or the file system has none."""
        try:
            raw = RawReads(self._directory, read_manifest(self._directory).layout, self.config.num_experts, PIECE_BYTES)
        except (AttributeError, OSError):
            return None
        self._stack.callback(raw.close)
        return raw

    def calls(self, text: TextIds, batch: int, rounds: int) -> dict[str, Callable[[int], float]]:
        """Read a prompt, take the first step, and return calls that time the following ones."""
        dense, dtype = self.contenders[MEMORY].model, self._layers[0].up.dtype
        tokens, device = text.streams(batch, PROMPT_TOKENS + 1 + rounds), torch.device("cpu")
        sessions: dict[bool, Session] = {}
        for is_recorded in {fed.is_recorded for fed in self.contenders.values()}:
            replay = None if self._trace is None or not is_recorded else Replay(self._trace, batch)
            cache = KeyValueCache(dense.config, batch, tokens.shape[1], device=device, dtype=dtype)
            sessions[is_recorded] = Session(tokens, cache, replay)
            model = self._follower if is_recorded else dense
            for block in blocks_of(model):
                if isinstance(block.router, RecordedRouter):
                    block.router.replay = replay
            sessions[is_recorded].read_prompt(model)
        for path in sorted(self._directory.glob("rows-*")):  # into the page cache, which direct reads pass by
            path.read_bytes()
        made: dict[str, Callable[[int], float]] = {}
        for name, fed in self.contenders.items():
            made[name] = partial(self._step, fed, sessions[fed.is_recorded])
            fed.steps.clear()
            made[name](-1)
        return made

    def _step(self, fed: Fed, session: Session, number: int) -> float:
        session.go_to(PROMPT_TOKENS + 1 + number)
        if fed.is_cold and self._raw is None:
            workload.drop(self._directory)
        if fed.offloaded is not None:
            fed.offloaded.loads.clear()
        seconds = decode_step(fed.model, session.tokens[:, session.cache.length], session.cache)
        if fed.offloaded is not None and number >= 0:
            loads = fed.offloaded.loads
            reading = sum(load.seconds for load in loads)
            again = fed.is_cold and number % RAW_EVERY == 0
            fed.steps.append(
                (sum(len(load.extents) for load in loads), reading, self._reread(loads) if again else None)
            )
        return seconds

    @torch.inference_mode()
    def _reread(self, loads: Sequence[Load]) -> float | None:
        """Return the seconds of bare reads of what a step read, each behind products of a layer, as in the step.

        Without those, cores and disk are at work already: reads of single experts then take 5 % less time.
        """
        if self._raw is None or not loads:
            return None
        attention, seconds = blocks_of(self.contenders[MEMORY].model)[0].attention, 0.0
        hidden_states = torch.ones(1, self.config.hidden_size, dtype=self._layers[0].up.dtype)
        for load in loads:
            attention.out(attention.qkv(hidden_states)[:, : attention.out.in_features])
            start = time.perf_counter()
            self._raw(torch.tensor(load.extents))
            seconds += time.perf_counter() - start
        return seconds

    def reports(self, batch: int) -> dict[str, OffloadReport]:
        """Say what the contenders on disk read in the steps since `calls`."""
        return {
            name: self._report(fed, fed.offloaded, batch)
            for name, fed in self.contenders.items()
            if fed.offloaded is not None
        }

    def _report(self, fed: Fed, offloaded: OffloadedExperts, batch: int) -> OffloadReport:
        experts = statistics.mean(count for count, _, _ in fed.steps)
        ratios = [reading / raw for _, reading, raw in fed.steps if raw]
        return OffloadReport(
            experts_per_layer=experts / self.config.num_layers,
            uniform=uniform_loads(self.config.num_experts, batch),
            step_bytes=experts * self.expert_bytes,
            reading_ms=1e3 * statistics.median(reading for _, reading, _ in fed.steps),
            paper_ms=1e3 * experts * self.expert_bytes / PAPER_BYTES_PER_SECOND,
            over_raw=statistics.median(ratios) if ratios else None,
            memory_mb=offloaded.memory_bytes / 2**20,
        )


Reports = Mapping[int, Mapping[str, OffloadReport]]
"""By batch size and contender."""


def moe_targets(decode: Mapping[int, Timings], reports: Reports) -> list[Target]:
    """Say whether MoE on disk is a fair opponent."""
    found: list[Target] = []
    for batch, timings in decode.items():
        if RESIDENT in timings.seconds:
            found.append(timings.target(f"batch {batch}: ", RESIDENT, MEMORY, 1.03))
        for name, report in reports[batch].items():
            if report.over_raw is not None:
                title = f"batch {batch}: reading of {name} over bare O_DIRECT threads"
                found.append(Target(title, report.over_raw, 1.1))
    return found


def print_reports(decode: Mapping[int, Timings], reports: Reports, mole: str, console: Console) -> None:
    """Print what was read, and how long steps take against MoLE's."""
    headings = (
        "batch",
        "contender",
        "experts/layer",
        "as the paper",
        "MB/step",
        "ms reading",
        "at 16 GB/s",
        "over raw",
    )
    table = Table(*headings, title="MoE on disk, per step")
    for batch, by_name in reports.items():
        for name, report in by_name.items():
            raw = "-" if report.over_raw is None else f"{report.over_raw:.2f}"
            loaded = f"{report.experts_per_layer:.2f}", f"{report.uniform:.2f}", f"{report.step_bytes / 1e6:.1f}"
            table.add_row(str(batch), name, *loaded, f"{report.reading_ms:.1f}", f"{report.paper_ms:.2f}", raw)
    console.print(table)
    for batch, timings in decode.items():
        for name in timings.seconds:
            if name.startswith((FEW, RECENT)):
                console.print(f"batch {batch}: {name} over {mole}: {timings.describe(name, mole)}", soft_wrap=True)
