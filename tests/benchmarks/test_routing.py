"""Recorded choices of experts: what a model chose is what a replay chooses."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from src.benchmarks import routing
from src.benchmarks.routing import RecordedRouter, Replay, RoutingTrace, find_trace, load_trace, record
from src.errors import RunError, UserError
from src.model.router import Router
from src.train import RunResult, train
from tests.benchmarks.traces import trace_of
from tests.conftest import small_config
from tests.model.models import CONFIGS, build, token_ids

MOE = ("model.num_experts=10", "model.expert_intermediate_size=16", "model.expert_input=hidden", "model.top_k=2")


def test_new_experts_are_those_that_the_token_before_did_not_choose() -> None:
    trace = trace_of([[(0, 1), (2, 3)], [(1, 0), (3, 4)], [(5, 6), (4, 3)]])
    assert trace.new_experts == pytest.approx((0 + 1 + 2 + 0) / 4)


def test_a_trace_survives_its_file_and_takes_a_few_kilobytes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    choices = torch.rand(2000, 4, 10, generator=generator).topk(2).indices
    trace = RoutingTrace(choices, 10, {"model": "moe", "steps": 800})
    trace.save(tmp_path / "trace.npz")
    again = load_trace(tmp_path / "trace.npz")
    assert torch.equal(again.experts, choices)
    assert (again.num_experts, again.about) == (10, trace.about)
    assert (tmp_path / "trace.npz").stat().st_size < 10_000


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.npz: no routing trace; record one with `python -m src\.benchmarks\."):
        load_trace(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "other.npz", other=np.zeros(3))
    np.savez(tmp_path / "beyond.npz", experts=np.full((2, 1, 2), 12), about=np.array('{"num_experts": 10}'))
    for name in ("text", "other", "beyond"):
        with pytest.raises(UserError, match=rf"{name}\.npz: not a routing trace \(.+\); record it again"):
            load_trace(tmp_path / f"{name}.npz")


def test_a_missing_trace_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(routing, "TRACE", tmp_path / "routing.npz")
    with (console := Console(width=300)).capture() as printed:
        assert find_trace(None, console) is None
    assert "no routing trace" in printed.get() and "src.benchmarks.routing" in printed.get()
    trace_of([[(0, 1)]]).save(tmp_path / "routing.npz")
    assert find_trace(None, console) is not None
    with pytest.raises(UserError, match="no routing trace"):
        find_trace(tmp_path / "other.npz", console)


def test_a_replay_reads_far_apart_and_repeats_layers() -> None:
    trace = trace_of([[(number, 90 + layer) for layer in range(2)] for number in range(8)], num_experts=100)
    replay = Replay(trace, batch=2)
    assert replay.chosen(0, 2).tolist() == [[[0, 90], [1, 90]], [[4, 90], [5, 90]]]
    replay.position = 3
    assert replay.chosen(3, 2).tolist() == [[[3, 91], [4, 91]], [[7, 91], [0, 91]]]  # layer 3 takes layer 1 of two


def test_a_replay_of_a_recording_routes_as_the_model_did() -> None:
    config = replace(CONFIGS["moe"], num_layers=2)
    model = build(config)
    ids = token_ids(config, batch_size=3, length=7)
    trace = RoutingTrace(record(model, ids), config.num_experts, {})
    assert trace.experts.shape == (21, 2, config.active_experts)
    with torch.inference_mode():
        expected = model(ids)
        for layer, block in enumerate(model.blocks):
            router = block.get_submodule("router")
            assert isinstance(router, Router)
            block.add_module("router", recorded := RecordedRouter(router, layer))
            recorded.replay = Replay(trace, batch=3)
        assert torch.equal(model(ids), expected)


@pytest.fixture(scope="module")
def moe_run(tmp_path_factory: pytest.TempPathFactory, small_overrides: Sequence[str]) -> RunResult:
    more = (*MOE, "trainer.max_steps=2")
    return train(small_config(small_overrides, tmp_path_factory.mktemp("moe"), *more))


@pytest.mark.slow
def test_the_command_records_consecutive_held_out_tokens(
    moe_run: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tokens in (40, 70):
        routing.main(["--run", str(moe_run.run_dir), "--tokens", str(tokens), "--output", str(tmp_path / f"{tokens}")])
    short, long = (load_trace(tmp_path / str(tokens)) for tokens in (40, 70))
    assert (len(short.experts), len(long.experts), long.num_experts) == (40, 70, 10)
    assert torch.equal(long.experts[:40], short.experts)
    assert long.about["steps"] == 2
    assert "70 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--tokens 100000000: the held-out text of .+ has \d+; take fewer"):
        routing.main(["--run", str(moe_run.run_dir), "--tokens", "100000000", "--output", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_a_run_that_chooses_no_experts_is_refused(trained: RunResult, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--run .+ is no MoE that chooses among at most 256 experts"):
        routing.main(["--run", str(trained.run_dir), "--output", str(tmp_path / "x")])
    with pytest.raises(RunError, match=r"--run.+no such run directory"):
        routing.main(["--run", str(tmp_path / "none"), "--output", str(tmp_path / "x")])
