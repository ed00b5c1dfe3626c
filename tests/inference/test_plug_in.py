"""Plug-ins attached to the model in memory that they were trained on, and detached: exact, and nothing is left over."""

import gc
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.errors import LutError, RunError
from src.inference import generate, load_model
from src.lut import build_lut
from src.model import ModelConfig, Transformer
from src.run_directory import PlugIn, RunDirectory, added_weights, identify_weights
from tests.model.models import build, token_ids
from tests.training.test_added_experts import BASES, with_experts, write_base

DENSE = {name: config for name, config in BASES.items() if not config.num_experts}


def write_plug_in(path: Path, base: RunDirectory, config: ModelConfig, seed: int = 1) -> RunDirectory:
    """Write a plug-in of random experts and routers, with its table."""
    path.mkdir()
    run, plug_in = RunDirectory(path), PlugIn(str(base.path), base.identity().backbone)
    values = {"name": path.name, "model": config.to_dict(), "trainer": {"max_steps": 1}}
    run.write_config(values, plug_in=plug_in)
    run.write_weights(build(config, torch.float32, seed=seed).state_dict())
    build_lut(run, path / "lut", dtype="float32")
    return run


def whole_model(base: RunDirectory, config: ModelConfig, seed: int = 1) -> Transformer:
    """Return the model of a base and of what `write_plug_in` adds to it, in float32."""
    model = build(config, torch.float32, seed=seed)
    with load_model(base.path, dtype=torch.float32) as alone:
        model.load_state_dict(alone.state_dict(), strict=False)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_attached_and_detached(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = with_experts(DENSE[name])
    base = write_base(tmp_path / "base", DENSE[name], dtype)
    run, ids = write_plug_in(tmp_path / "plug-in", base, config), token_ids(config)
    expected = whole_model(base, config)(ids)
    with load_model(base.path, dtype=torch.float32) as model:
        alone, text = model(ids), generate(model, ids, max_new_tokens=9)
        for form in ("lut", "ffn"):
            model.attach(run.path, experts=form)
            torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-5)
            assert model.config.mixture_layers == (0, 2)
        model.detach()
        assert torch.equal(model(ids), alone)
        assert torch.equal(generate(model, ids, max_new_tokens=9), text)
        assert model.config.to_dict() == DENSE[name].to_dict()
        model.detach()  # once more changes nothing
    for model in (
        load_model(run.path, dtype=torch.float32),
        load_model(run.path, experts="ffn", dtype=torch.float32),
        load_model(base.path, attach=run.path, dtype=torch.float32),
    ):
        with model:
            torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-5)
    with load_model(run.path) as one, load_model(run.path, experts="ffn") as other:  # in the base's precision
        assert one.embedding.weight.dtype == dtype
        torch.testing.assert_close(one(ids), other(ids), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_a_plug_in_holds_no_weight_of_its_base(tmp_path: Path) -> None:
    config = with_experts(DENSE["tied"])
    base = write_base(tmp_path / "base", DENSE["tied"], torch.bfloat16)
    run = write_plug_in(tmp_path / "plug-in", base, config)
    weights = run.backbone_weights()
    assert weights.keys() == Transformer(config, with_experts=False).state_dict().keys()
    assert {name for name in weights if name in added_weights(weights)} == {
        f"blocks.{layer}.router.weight" for layer in (0, 2)
    }
    stored = run.backbone_path.stat().st_size + run.experts_path.stat().st_size
    added = sum(weight.nbytes for weight in added_weights(build(config, torch.float32).state_dict()).values())
    assert added < stored < added + 4096
    own = added_weights(build(config, torch.float32, seed=1).state_dict())
    assert run.identity() == identify_weights({**base.backbone_weights(), **own})


@torch.no_grad()
def test_ten_plug_ins_in_turn_leave_nothing_behind(tmp_path: Path) -> None:
    config = with_experts(replace(DENSE["grouped"], vocab_size=300, hidden_size=64, head_dim=16))
    base_config = replace(DENSE["grouped"], vocab_size=300, hidden_size=64, head_dim=16)
    base, ids = write_base(tmp_path / "base", base_config), token_ids(base_config, length=20)
    runs = [write_plug_in(tmp_path / f"plug-in-{seed}", base, config, seed) for seed in range(10)]
    expected = [whole_model(base, config, seed)(ids) for seed in range(10)]
    with load_model(base.path) as model:
        alone = model(ids)

        def cycle(number: int) -> None:
            model.attach(runs[number % 10].path, reader=("pread", "memmap")[number % 2], cache_mb=number % 3)
            torch.testing.assert_close(model(ids), expected[number % 10], rtol=0, atol=1e-4)
            model.detach()
            assert torch.equal(model(ids), alone)

        for number in range(10):
            cycle(number)
        before = anonymous_bytes()
        for number in range(20):
            cycle(number)
        assert anonymous_bytes() - before < 2**20
        held = files_threads_tensors()
        for number in range(4):
            cycle(number)
        assert files_threads_tensors() == held


def anonymous_bytes() -> int:
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def files_threads_tensors() -> tuple[int, int, int]:
    """Return how many of each this process holds; looking for tensors takes memory itself."""
    gc.collect()
    tensors = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), tensors


def test_another_base_is_refused_by_name(tmp_path: Path) -> None:
    config = DENSE["dense"]
    base = write_base(tmp_path / "base", config)
    other = write_base(tmp_path / "other", replace(config, init_std=0.5))
    run = write_plug_in(tmp_path / "plug-in", base, with_experts(config))
    wrong = rf"plug-in: plugs into the run {base.path} \(backbone .{{12}}\), but {other.path} has other weights"
    with load_model(other.path) as model, pytest.raises(RunError, match=wrong):
        model.attach(run.path)
    with pytest.raises(RunError, match=wrong):
        load_model(run.path, base=other.path)
    with pytest.raises(RunError, match=rf"{base.path}: holds all of its weights, so it is no plug-in"):
        load_model(other.path, attach=base.path)
    with load_model(base.path) as model:
        model.attach(run.path)
        before = model(token_ids(config))
        with pytest.raises(LutError, match="no such table"):
            model.attach(run.path, experts="lut", lut="lut-nf4")
        assert torch.equal(model(token_ids(config)), before)  # what is attached stays


def test_a_base_that_moved_is_asked_for(tmp_path: Path) -> None:
    config = DENSE["dense"]
    base = write_base(tmp_path / "base", config)
    run = write_plug_in(tmp_path / "plug-in", base, with_experts(config))
    moved = Path(shutil.move(base.path, tmp_path / "elsewhere"))
    with pytest.raises(RunError, match=rf"plugs into the run {base.path}, but .* say where it is with --base \(in"):
        load_model(run.path)
    with load_model(run.path, base=moved) as model, load_model(moved, attach=run.path) as same:
        assert torch.equal(model(token_ids(config)), same(token_ids(config)))


@torch.no_grad()
def test_ids_without_rows_give_the_logits_of_the_base(tmp_path: Path) -> None:
    config = replace(with_experts(DENSE["dense"]), expert_ids="seen")
    base = write_base(tmp_path / "base", DENSE["dense"])
    run = write_plug_in(tmp_path / "plug-in", base, config)
    has_row = load_file(run.backbone_path)["has_row"]
    assert 0 < has_row.sum() < config.vocab_size
    unseen, seen = ((has_row == kind).nonzero().flatten().repeat(2)[:6].unsqueeze(0) for kind in (False, True))
    with load_model(base.path) as model:
        alone = model(unseen), model(seen)
        for form in ("lut", "ffn"):
            model.attach(run.path, experts=form)
            assert torch.equal(model(unseen), alone[0])
            assert not torch.equal(model(seen), alone[1])
        model.detach()
        assert torch.equal(model(seen), alone[1])
        assert model.has_row is None
