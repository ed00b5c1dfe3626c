"""torch.compile as a setting: few graphs whatever the number of distinct ids, and the same numbers."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from src.config import load_config
from src.data.config import DataConfig, TokenizerConfig
from src.data.datamodule import StepWindows
from src.data.packed_corpus import prepare_corpus
from src.fit import build_module
from src.model import ModelConfig, Transformer
from src.model.loss import next_token_loss
from src.system.signals import StopSignals
from tests.conftest import CONFIGS, STDLIB

CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=32,
    num_layers=3,
    num_heads=2,
    intermediate_size=64,
    num_experts=3,
    expert_intermediate_size=48,
    max_sequence_length=64,
)


@pytest.fixture(scope="module")
def batches(cache_dir: Path) -> list[Tensor]:
    config = DataConfig(
        files=[f"{STDLIB}/json/*.py", f"{STDLIB}/email/*.py"],
        tokenizer=TokenizerConfig(vocab_size=512),
        sequence_length=32,
        global_batch_size=4,
        micro_batch_size=4,
        validation_fraction=0.2,
        cache_dir=str(cache_dir),
    )
    steps = StepWindows(prepare_corpus(config), config, rank=0, world_size=1)
    return [steps[step][0] for step in range(50)]


def losses(model: Transformer, batches: list[Tensor]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: list[float] = []
    for windows in batches:
        loss = next_token_loss(model.hidden_states(windows[:, :-1]), model.head, windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def built(config: ModelConfig = CONFIG) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """A compiler that counts graphs and generates no code."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    original = nn.Module.compile

    def compile_counted(module: nn.Module) -> None:
        original(module, backend=counter)

    monkeypatch.setattr(nn.Module, "compile", compile_counted)
    return counter


def test_few_graphs_serve_every_number_of_distinct_ids(
    batches: list[Tensor], counter: CompileCounterWithBackend
) -> None:
    model = built()
    model.compile_layers()
    compiled = losses(model, batches)
    assert len({windows[:, :-1].unique().numel() for windows in batches}) > 10
    assert counter.frame_count <= 3 + 3  # blocks share their graphs, and so do the experts
    assert compiled == pytest.approx(losses(built(), batches), abs=1e-4)


def test_groups_of_any_size_reuse_the_graphs_around_them(
    batches: list[Tensor], counter: CompileCounterWithBackend
) -> None:
    moe = replace(CONFIG, intermediate_size=0, num_experts=6, expert_input="hidden", top_k=2)
    model = built(moe)
    model.compile_layers()
    compiled = losses(model, batches[:1])
    graphs = counter.frame_count
    compiled += losses(model, batches[1:6])
    assert counter.frame_count == graphs
    reference = built(moe)
    assert compiled == pytest.approx(losses(reference, batches[:1]) + losses(reference, batches[1:6]), abs=1e-4)


@pytest.mark.slow
def test_compiled_code_gives_the_losses_of_eager_code(batches: list[Tensor]) -> None:
    torch._dynamo.reset()
    model = built()
    model.compile_layers()
    assert losses(model, batches) == pytest.approx(losses(built(), batches), abs=1e-4)


def test_compiled_layers_are_not_split_at_the_size_of_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)
    overrides = ["trainer.compile=true", "trainer.accelerator=cpu", "model.num_layers=1"]
    config = load_config(CONFIGS / "quickstart.yaml", overrides)
    text = Mock(byte_lengths=torch.ones(config.model.vocab_size, dtype=torch.int64), document_separator=None)
    build_module(config, text, StopSignals())
    assert not torch._dynamo.config.optimize_ddp
