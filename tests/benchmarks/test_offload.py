"""MoE whose experts are on disk gives the logits of MoE in memory, and reads what its policy says."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.benchmarks.common import model_config
from src.benchmarks.moe import (
    FEW,
    MEMORY,
    RECENT,
    RECORDED,
    RESIDENT,
    MoeContenders,
    blocks_of,
    experts_of,
    memory_left,
    moe_config,
    random_moe,
    sharing,
)
from src.benchmarks.offload import (
    ExtentReader,
    KeepFew,
    KeepRecent,
    OffloadedExperts,
    OffloadedLayer,
    Policy,
    uniform_loads,
    write_experts,
)
from src.benchmarks.routing import RoutingTrace
from src.benchmarks.workload import PROMPT_TOKENS, TextIds
from src.config import load_config
from src.errors import LutError, LutFormatError, UserError
from src.lut.readers.reader import Finish
from src.model import ModelConfig, Transformer
from tests.benchmarks.traces import trace_of

MOLE = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    intermediate_size=128,
    num_experts=4,
    expert_intermediate_size=128,
    init_std=0.3,
)
CONFIGS = Path(__file__).parents[2] / "configs" / "paper"
POLICIES: dict[str, Callable[[], Policy]] = {"two kept": KeepFew, "LRU": lambda: KeepRecent(7)}


def dense_of(mole: ModelConfig, dtype: torch.dtype) -> Transformer:
    torch.manual_seed(0)
    dense = Transformer(replace(mole, num_experts=0, expert_intermediate_size=0))
    return dense.to(dtype).eval().requires_grad_(False)


def on_disk(model: Transformer, reader: ExtentReader, policy: Policy) -> tuple[Transformer, OffloadedExperts]:
    layers = experts_of(model)
    offloaded, made = OffloadedExperts(reader, layers, policy), sharing(model, model.config)
    for layer, block in enumerate(blocks_of(made)):
        block.hidden_experts = OffloadedLayer(layers[layer], offloaded, layer)
    return made, offloaded


class BackwardsReader(ExtentReader):
    """Delivers what was requested last first."""

    def start(self, targets: Mapping[int, memoryview], arrived: Callable[[int], None]) -> Finish:
        super().start(targets, lambda _extent: None)()
        for extent in reversed(list(targets)):
            arrived(extent)
        return lambda: None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", [ExtentReader, BackwardsReader])
@torch.inference_mode()
def test_logits_are_those_of_experts_in_memory(
    tmp_path: Path, dtype: torch.dtype, policy: str, kind: type[ExtentReader]
) -> None:
    model = random_moe(dense_of(MOLE, dtype), moe_config(MOLE))
    write_experts(tmp_path, experts_of(model))
    for direct in (True, False):
        reader = kind(tmp_path, direct=direct)
        offloaded, experts = on_disk(model, reader, POLICIES[policy]())
        for batch, tokens in ((1, 1), (8, 1), (1, 1), (2, 20), (1, 1)):
            ids = torch.randint(97, (batch, tokens), generator=torch.Generator().manual_seed(batch))
            assert torch.equal(offloaded(ids), model(ids))
        assert experts.loads
        reader.close()


def test_experts_are_aligned_extents_in_the_form_of_those_in_memory(tmp_path: Path) -> None:
    layers = experts_of(random_moe(dense_of(MOLE, torch.bfloat16), moe_config(MOLE)))
    write_experts(tmp_path, layers)
    reader = ExtentReader(tmp_path, direct=False)
    size = reader.layout.row_bytes
    target = bytearray(size)
    for layer, expert in ((0, 0), (2, 9)):
        extent = 10 * layer + expert
        reader.start({extent: memoryview(target)}, lambda _extent: None)()
        stored = torch.frombuffer(target, dtype=torch.bfloat16)
        assert torch.equal(stored, torch.cat([weight[expert].flatten() for weight in layers[layer].weights]))
        assert reader._files.locate(extent)[1] % 4096 == 0
    reader.close()
    odd = replace(MOLE, hidden_size=24, intermediate_size=24, expert_intermediate_size=24)
    with pytest.raises(UserError, match=r"an expert takes 1,152 bytes, which is no multiple of 4096"):
        write_experts(tmp_path / "odd", experts_of(random_moe(dense_of(odd, torch.bfloat16), moe_config(odd))))


@pytest.mark.parametrize("direct", [True, False])
@torch.inference_mode()
def test_an_extent_that_cannot_be_read_is_an_error(tmp_path: Path, direct: bool) -> None:
    model = random_moe(dense_of(MOLE, torch.bfloat16), moe_config(MOLE))
    write_experts(tmp_path, experts_of(model))
    reader = ExtentReader(tmp_path, direct=direct)
    offloaded, _ = on_disk(model, reader, KeepFew())
    (shard,) = tmp_path.glob("rows-*")
    with shard.open("r+b") as file:
        file.truncate(8192)
    with pytest.raises(LutFormatError, match=r"rows-00000.safetensors: 8,192 bytes long while"):
        offloaded(torch.arange(20).unsqueeze(0))
    reader.close()
    with pytest.raises(LutError, match="closed"):
        offloaded(torch.arange(20).unsqueeze(0))


def loads_of(policy: Policy, steps: Sequence[Sequence[tuple[int, list[int]]]]) -> list[int]:
    """Loads of each step, which is a list of (layer, experts that it uses)."""
    held: set[tuple[int, int]] = set()
    counts: list[int] = []
    for step in steps:
        loaded = 0
        for layer, used in step:
            wanted = {(layer, expert) for expert in used}
            loaded += len(wanted - held)
            held = (held | wanted) - set(policy.leaving(layer, used))
        counts.append(loaded)
        assert len(held) <= policy.most_kept(2)
    return counts


def test_the_papers_policy_keeps_the_experts_of_the_step_before() -> None:
    layer_0 = [[0, 1], [1, 2], [2, 3], [0, 1], [0, 1]]  # new: 2, 1, 1, 2, 0
    layer_1 = [[4, 5], [4, 5], [4, 6], [4, 5], [5, 6]]  # new: 2, 0, 1, 1, 1
    steps = [[(0, a), (1, b)] for a, b in zip(layer_0, layer_1, strict=True)]
    assert loads_of(KeepFew(), steps) == [4, 1, 2, 3, 1]


def test_an_lru_keeps_the_last_experts_of_all_layers() -> None:
    steps = [[(0, [0, 1]), (1, [0])], [(0, [1, 2]), (1, [0])], [(0, [0, 1]), (1, [3])], [(0, [2]), (1, [0, 3])]]
    # of 3: {00 01 10}; 02 is new and 00 leaves {10 01 02}; 00 is new and 10 leaves, 01 stays, 13 is new and 02 leaves
    assert loads_of(KeepRecent(3), steps) == [3, 1, 2, 2]
    assert loads_of(KeepRecent(0), steps) == [3, 3, 3, 3]
    assert loads_of(KeepRecent(8), steps) == [3, 1, 1, 0]


@pytest.mark.parametrize(("experts", "expected"), [(10, {1: 1.6, 8: 6.7, 32: 8.0}), (34, {1: 1.9, 8: 12.3, 32: 27.4})])
def test_the_closed_form_gives_the_papers_loads_and_those_of_even_routing(
    experts: int, expected: Mapping[int, float]
) -> None:
    assert {batch: round(uniform_loads(experts, batch), 1) for batch in expected} == expected
    choices = random.Random(0)
    for batch in expected:
        used = [
            sorted({expert for _ in range(batch) for expert in choices.sample(range(experts), 2)}) for _ in range(1500)
        ]
        found = loads_of(KeepFew(), [[(0, step)] for step in used])[1:]
        assert sum(found) / len(found) == pytest.approx(uniform_loads(experts, batch), rel=0.03)


def test_the_moe_of_a_shape_is_the_papers_and_the_lru_gets_its_memory() -> None:
    for shape, name in (("160m-4e", "160m-moe-10e"), ("160m-16e", "160m-moe-34e"), ("410m-4e", "410m-moe-10e")):
        paper = load_config(CONFIGS / f"{name}.yaml").model
        made = moe_config(model_config(shape))
        assert all(
            getattr(made, key) == getattr(paper, key)
            for key in ("intermediate_size", "num_experts", "expert_intermediate_size", "expert_input", "top_k")
        )
    with torch.device("meta"):
        mole = Transformer(model_config("160m-4e"), with_experts=False).bfloat16()
        moe = Transformer(moe_config(model_config("160m-4e"))).bfloat16()
    expert_bytes = sum(weight[0].nbytes for weight in experts_of(moe)[0].weights)
    assert round(memory_left(mole, moe) / 2**20) == 108
    assert memory_left(mole, moe) // expert_bytes == 23


class Steps:
    """Contenders of a small MoE, and the logits that each of them computed in its last step."""

    def __init__(self, contenders: MoeContenders) -> None:
        self.contenders, self.logits = contenders, dict[str, Tensor]()
        for name, fed in contenders.contenders.items():
            fed.model.norm.register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, _module: torch.nn.Module, _args: tuple[Tensor, ...], hidden_states: Tensor) -> None:
        self.logits[name] = hidden_states


class Ids(TextIds):
    """Ids without a text."""

    def __init__(self, token_ids: Tensor) -> None:
        self.held_out, self._next = token_ids, 0


@pytest.fixture
def small_text() -> Ids:
    return Ids(torch.randint(97, (3000,), generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def contenders_of(stack: ExitStack, directory: Path, trace: RoutingTrace | None) -> MoeContenders:
    dense = dense_of(MOLE, torch.bfloat16)
    mole = sharing(dense, MOLE)
    return MoeContenders(stack, dense, mole, directory, trace)


@pytest.mark.parametrize("batch", [1, 8])
def test_contenders_take_the_same_steps_and_report_what_they_read(
    tmp_path: Path, stack: ExitStack, small_text: Ids, batch: int
) -> None:
    trace = trace_of([[(number % 10, (number + 1) % 10)] * 2 for number in range(40)])
    contenders = contenders_of(stack, tmp_path, trace)
    steps = Steps(contenders)
    calls, rounds = contenders.calls(small_text, batch, 6), 6
    for number in range(rounds):
        for name, call in calls.items():
            assert call(number) > 0, name
        for suffix in ("", RECORDED):
            values = [value for name, value in steps.logits.items() if name.endswith(RECORDED) == bool(suffix)]
            assert len(values) == (2 if suffix else 6)
            assert all(torch.equal(value, values[0]) for value in values)
    reports = contenders.reports(batch)
    assert set(reports) == set(calls) - {MEMORY}
    assert reports[RESIDENT].experts_per_layer == 0
    few, recorded = reports[f"{FEW}, cold"], reports[f"{FEW}, cold{RECORDED}"]
    assert few.experts_per_layer == reports[f"{FEW}, warm"].experts_per_layer > 0
    assert few.step_bytes == pytest.approx(few.experts_per_layer * 3 * contenders.expert_bytes)
    assert few.uniform == uniform_loads(10, batch)
    assert few.paper_ms == pytest.approx(few.step_bytes / 16e6)
    assert few.over_raw is not None and few.over_raw > 0
    assert reports[f"{RECENT}, warm"].over_raw is None
    if batch == 1:
        assert recorded.experts_per_layer == 1  # each token shares one of its two with the token before


def test_text_is_consecutive_and_sequences_start_far_apart(small_text: Ids) -> None:
    streams = small_text.streams(4, 900)
    for index, start in enumerate((0, 750, 1500, 2250)):
        assert torch.equal(streams[index], small_text.held_out.roll(-start)[:900])
    assert PROMPT_TOKENS == 512


def test_a_trace_of_another_number_of_experts_is_left_out(tmp_path: Path, stack: ExitStack) -> None:
    trace = replace(trace_of([[(0, 1)]]), num_experts=34)
    assert not any(name.endswith(RECORDED) for name in contenders_of(stack, tmp_path, trace).contenders)
