"""A MoLE whose experts know some ids alone: both forms agree, and without those ids it is the model without experts."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.errors import CheckpointError, ConfigError, RunError
from src.evaluation.equivalence import zeroed_rows
from src.inference import generate, load_model
from src.inference.disk_experts import DiskExperts
from src.interop import export_official
from src.lut import build_lut, read_manifest
from src.lut.codecs import CODECS
from src.lut.readers import READERS
from src.model import ModelConfig, Transformer
from src.run_directory import RunDirectory, read_tensors
from tests.inference.runs import CONFIG, write_run
from tests.inference.test_plug_in import write_plug_in
from tests.training.test_added_experts import write_base

SPARSE = replace(CONFIG, expert_ids="seen")
SEEN = torch.arange(0, 97, 3)
UNSEEN = torch.tensor([token_id for token_id in range(97) if token_id % 3])


@pytest.fixture(scope="module", params=["plain", "block", "plug-in"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A random run of the paper's block; one with grouped, gated and tied weights and permuted embeddings; one with
    experts as they are added to a trained model."""
    config = SPARSE
    if request.param == "block":
        config = replace(config, num_kv_heads=2, activation="swiglu", tie_embeddings=True, expert_permutation=3)
    if request.param == "plug-in":
        config = replace(config, expert_layers=["auto"], null_expert=True)
    return RunDirectory(write_run(tmp_path_factory.mktemp("sparse") / "run", config=config))


def texts() -> Iterator[Tensor]:
    """Yield long and short texts of seen ids, unseen ids, and both."""
    for ids in (SEEN, UNSEEN, torch.arange(97)):
        for shape in ((3, 40), (1, 5), (2, 1)):
            yield ids[torch.randint(len(ids), shape, generator=torch.Generator().manual_seed(1))]


def without_experts(run: RunDirectory) -> Transformer:
    """Return the Dense model of a run's other weights."""
    none = {"num_experts": 0, "expert_intermediate_size": 0, "expert_permutation": None, "expert_layers": None}
    config = ModelConfig.from_dict(
        {**run.model_config().to_dict(), **none, "null_expert": False, "expert_ids": "all"}, "here"
    )
    model = Transformer(config)
    weights = read_tensors(run.backbone_path)
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model.eval()


@pytest.mark.parametrize("reader", READERS)
@torch.inference_mode()
def test_both_forms_agree_on_seen_unseen_and_mixed_ids(run: RunDirectory, reader: str) -> None:
    with (
        load_model(run.path, experts="ffn") as computed,
        load_model(run.path, experts="lut", reader=reader, cache_mb=0.01) as read,
    ):
        for token_ids in texts():
            torch.testing.assert_close(read(token_ids), computed(token_ids), rtol=0, atol=5e-5)
        prompts = torch.tensor([[0, 1, 2, 3], [1, 2, 4, 5]])
        ends = [generate(model, prompts, max_new_tokens=20) for model in (computed, read)]
        assert torch.equal(*ends)


@torch.inference_mode()
def test_unseen_ids_alone_give_the_logits_of_the_model_without_experts_and_read_nothing(run: RunDirectory) -> None:
    dense = without_experts(run)
    with load_model(run.path, experts="ffn") as computed, load_model(run.path, experts="lut") as read:
        assert isinstance(read.experts, DiskExperts)
        for token_ids in texts():
            before = read.experts.store.stats
            logits, from_table = computed(token_ids), read(token_ids)
            after, expected = read.experts.store.stats, dense(token_ids)
            seen = token_ids[token_ids % 3 == 0].unique()
            assert after.bytes - before.bytes == len(seen) * read.experts.store.layout.row_bytes
            for found in (logits, from_table):
                assert torch.equal(found, expected) == (len(seen) == 0)
        rows_of = zeroed_rows(read)
        token_ids = UNSEEN[:30].unsqueeze(0)
        trunk = read.trunk(token_ids, expert_rows=rows_of(token_ids))
        assert torch.equal(read.head(trunk.hidden_states), dense(token_ids))


@pytest.mark.parametrize("dtype", CODECS)
@torch.inference_mode()
def test_in_every_precision_unseen_ids_add_nothing(dtype: str, tmp_path: Path) -> None:
    config = replace(SPARSE, hidden_size=128)
    run = RunDirectory(write_run(tmp_path / "run", dtype=dtype, config=config))
    with load_model(run.path, experts="lut") as read:
        assert torch.equal(read(UNSEEN.unsqueeze(0)), without_experts(run)(UNSEEN.unsqueeze(0)))


def test_a_run_and_a_model_build_the_same_table(run: RunDirectory, tmp_path: Path) -> None:
    with load_model(run.path, experts="ffn") as computed:
        build_lut(computed, tmp_path / "lut", dtype="float32", token_counts=torch.arange(97))
    assert read_manifest(tmp_path / "lut").layout.num_rows == len(SEEN)
    for name in ("rows-00000.safetensors", "row_ids.safetensors", "token_counts.safetensors"):
        assert (tmp_path / "lut" / name).read_bytes() == (run.lut_path() / name).read_bytes()


def test_what_cannot_hold_such_a_model_refuses_it_by_name(tmp_path: Path) -> None:
    run = RunDirectory(write_run(tmp_path / "run", config=replace(SPARSE, intermediate_size=40)))
    with pytest.raises(CheckpointError, match=r"model\.expert_ids is seen, but their code computes all"):
        export_official(run.path, tmp_path / "official")
    assert not (tmp_path / "official").exists()
    for change in ({"num_experts": 0}, {"expert_input": "hidden"}):
        with pytest.raises(ConfigError, match=r"model\.expert_ids: seen, but this (dense|moe) model"):
            ModelConfig.from_dict({**SPARSE.to_dict(), **change}, "here")


@pytest.mark.parametrize(("written", "stated"), [(SPARSE, CONFIG), (CONFIG, SPARSE)])
def test_a_config_that_says_otherwise_than_the_weights_is_refused(
    written: ModelConfig, stated: ModelConfig, tmp_path: Path
) -> None:
    run = RunDirectory(write_run(tmp_path / "run", config=written))
    run.write_config({"model": stated.to_dict()})
    for form in ("lut", "ffn"):
        with pytest.raises(RunError, match=r"does not fit the model of config\.yaml: .*has_row"):
            load_model(run.path, experts=form)
    base = write_base(tmp_path / "base", replace(CONFIG, num_experts=0, expert_intermediate_size=0))
    plug_in = write_plug_in(tmp_path / "plug-in", base, written)
    record = plug_in.plug_in()
    plug_in.write_config({"model": stated.to_dict()}, plug_in=record)
    with load_model(base.path) as model, pytest.raises(RunError, match=r"has_row does not fit model\.expert_ids"):
        model.attach(plug_in.path, experts="ffn")
