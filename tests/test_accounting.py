"""The dry run's figures against the paper's, over the configs that name its models; FLOPs against a counter."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from src import train
from src.accounting import Account, account
from src.accounting.account import count_parameters, expert_memory, sharded_memory, whole_memory
from src.accounting.flops import Flops, estimated_unique_ids, forward_flops, lookup_flops
from src.config import load_config
from src.errors import ConfigError
from src.lut.codecs import CODECS
from src.model import ModelConfig, Transformer
from src.model.config import Activation
from src.model.sharding import shard_model
from src.training.config import Multipliers, OptimizerConfig
from src.training.optimization import freeze

PAPER = Path("configs/paper")
GIB, KIB = 2**30, 2**10
TINY = ModelConfig(vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24)
LLAMA: dict[str, Any] = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "activation": "swiglu",
    "tie_embeddings": True,
}
TINY_MOLE = replace(TINY, num_experts=3, expert_intermediate_size=20)
TINY_MOE = replace(TINY_MOLE, intermediate_size=0, expert_input="hidden", top_k=2)
PAPERS = {"dense": TINY, "moe": TINY_MOE, "mole": TINY_MOLE}
MODELS = PAPERS | {f"{name}-llama": replace(model, **LLAMA) for name, model in PAPERS.items()}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def model_of(name: str) -> ModelConfig:
    return load_config(PAPER / f"{name}.yaml").model


def account_of(model: ModelConfig, unique_ids: int | None = None, *, trains_backbone: bool = True) -> Account:
    return account(
        model,
        sequence_length=8,
        micro_batch_size=2,
        precision="32-true",
        unique_ids=unique_ids,
        trains_backbone=trains_backbone,
    )


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("160m-dense", "0.162"),
        ("160m-moe-10e", "0.389"),
        ("160m-mole-4e", "0.389"),
        ("160m-moe-34e", "1.069"),
        ("160m-mole-16e", "1.068"),
        ("410m-dense", "0.405"),
        ("410m-moe-10e", "1.211"),
        ("410m-mole-4e", "1.210"),
        ("410m-moe-34e", "3.627"),
        ("410m-mole-16e", "3.627"),
        ("1b-dense", "1.011"),
        ("1b-moe-10e", "3.159"),
        ("1b-mole-4e", "3.159"),
        ("ablations/table7-full-activation", "0.389"),
        ("ablations/table7-shared-expert", "0.389"),
    ],
)
def test_trained_parameters_at_the_padded_vocabulary(name: str, billions: str) -> None:
    model = model_of(name)
    assert model.vocab_size == 50304
    assert f"{count_parameters(model).trained / 1e9:.3f}" == billions


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("ablations/table5-expert-width-768", "0.4"),
        ("160m-mole-16e", "1.1"),
        ("ablations/table5-expert-width-12288", "3.8"),
        ("ablations/table6-experts-2", "0.3"),
        ("160m-mole-4e", "0.4"),
        ("ablations/table6-experts-8", "0.6"),
        ("ablations/table6-experts-32", "2.0"),
    ],
)
def test_trained_parameters_of_tables_5_and_6(name: str, billions: str) -> None:
    assert f"{count_parameters(model_of(name)).trained / 1e9:.1f}" == billions


@pytest.mark.parametrize(
    ("name", "offloaded_billions", "loaded_millions"),
    [
        ("160m-dense", "0.0", "0"),
        ("160m-moe-10e", "0.3", "57"),
        ("160m-mole-4e", "1.8", "0.037"),
        ("160m-moe-34e", "1.0", "57"),
        ("160m-mole-16e", "7.4", "0.15"),
        ("410m-moe-10e", "1.0", "201"),
        ("410m-mole-4e", "4.9", "0.098"),
        ("410m-moe-34e", "3.4", "201"),
        ("410m-mole-16e", "19.7", "0.39"),
        ("1b-moe-10e", "2.7", "537"),
        ("1b-mole-4e", "6.6", "0.131"),  # the paper prints 0.26, twice its own equation
        ("ablations/table5-expert-width-768", "7.4", "0.15"),
        ("ablations/table5-expert-width-12288", "7.4", "0.15"),
        ("ablations/table6-experts-2", "0.9", "0.02"),
        ("ablations/table6-experts-8", "3.7", "0.07"),
        ("ablations/table6-experts-32", "14.7", "0.29"),
    ],
)
def test_printed_offload_at_the_papers_vocabulary(name: str, offloaded_billions: str, loaded_millions: str) -> None:
    count = count_parameters(replace(model_of(name), vocab_size=50_000))
    decimals = len(loaded_millions.partition(".")[2])
    assert f"{count.offloaded / 1e9:.1f}" == offloaded_billions
    assert f"{count.loaded_per_token / 1e6:.{decimals}f}" == loaded_millions


@pytest.mark.parametrize(
    ("name", "num_experts", "billions", "gigabytes", "row_kib"),
    [
        ("160m-mole-4e", 4, "1.854", "3.71", 72),
        ("160m-mole-16e", 16, "7.42", "14.8", 288),
        ("410m-mole-4e", 4, "4.95", "9.9", 192),
        ("410m-mole-16e", 16, "19.78", "39.6", 768),
        ("1b-mole-4e", 4, "6.59", "13.2", 256),
        ("1b-mole-4e", 16, "26.4", "52.7", 1024),
    ],
)
def test_table_sizes_at_the_padded_vocabulary(
    name: str, num_experts: int, billions: str, gigabytes: str, row_kib: int
) -> None:
    costs = account_of(replace(model_of(name), num_experts=num_experts))
    (float16,) = (row for row in costs.offload if row.precision == "float16")
    decimals = [len(text.partition(".")[2]) for text in (billions, gigabytes)]
    assert f"{costs.parameters.offloaded / 1e9:.{decimals[0]}f}" == billions
    assert f"{float16.total_bytes / 1e9:.{decimals[1]}f}" == gigabytes
    assert float16.bytes_per_token == row_kib * KIB


@pytest.mark.parametrize(
    ("precision", "gib", "row_kib", "share"),
    [("float16", "3.5", 72, 1.0), ("nf4", "0.9", 18, 0.2513), ("nf3", "0.7", 14, 0.1953)],
)
def test_sizes_of_table_8_are_gibibytes(precision: str, gib: str, row_kib: int, share: float) -> None:
    rows = {row.precision: row for row in account_of(model_of("160m-mole-4e")).offload}
    assert f"{rows[precision].total_bytes / GIB:.1f}" == gib
    assert round(rows[precision].bytes_per_token / KIB) == row_kib
    assert rows[precision].total_bytes / rows["float16"].total_bytes == pytest.approx(share, abs=5e-5)


def test_resident_parameters_are_dense_plus_routers() -> None:
    dense, mole = count_parameters(model_of("160m-dense")), count_parameters(model_of("160m-mole-4e"))
    assert mole.resident == dense.trained + 12 * 4 * 768
    assert mole.experts == 12 * (4 * 2 * 768 * 3072 + 768)  # experts and one norm a layer


def test_moe_offloads_its_experts_as_floats_only() -> None:
    costs = account_of(TINY_MOE)
    assert costs.parameters.offloaded == costs.parameters.experts == 2 * 3 * 2 * 16 * 20
    assert {row.precision: row.bytes_per_token for row in costs.offload} == {
        "float32": 4 * 2 * 2 * 2 * 16 * 20,
        "bfloat16": 2 * 2 * 2 * 2 * 16 * 20,
        "float16": 2 * 2 * 2 * 2 * 16 * 20,
    }


def test_a_precision_whose_blocks_do_not_divide_the_width_is_skipped_with_its_reason() -> None:
    costs = account_of(replace(TINY_MOLE, hidden_size=20))
    assert {row.precision for row in costs.offload} | set(costs.skipped_precisions) == set(CODECS)
    assert {"float32", "bfloat16", "float16"}.isdisjoint(costs.skipped_precisions)
    assert "20" in costs.skipped_precisions["nf3"]


@models
def test_matrix_products_of_the_forward_pass_match_a_counter(model: ModelConfig) -> None:
    config = replace(model, expert_execution="per_token")
    token_ids = torch.randint(40, (2, 8))
    with FlopCounterMode(display=False) as counter:
        Transformer(config)(token_ids)
    assert _counted(counter) == token_ids.numel() * _matrix_products(forward_flops(config, sequence_length=8))


@models
def test_matrix_products_of_a_training_step_match_a_counter(model: ModelConfig) -> None:
    counted, expected = _training_step(model)
    assert counted == expected


@models
def test_checkpointing_costs_at_most_one_more_forward(model: ModelConfig) -> None:
    counted, expected = _training_step(replace(model, gradient_checkpointing=True))
    assert _training_step(model)[0] < counted <= expected < 1.08 * counted


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("layers", [[0, 2], [1], [3]], ids=str)
def test_a_frozen_backbone_costs_what_is_still_computed(layers: list[int | str], checkpointing: bool) -> None:
    shape = {"num_layers": 4, "expert_layers": layers, "null_expert": True, "gradient_checkpointing": checkpointing}
    counted, expected = _training_step(replace(TINY_MOLE, **shape), trains_backbone=False)  # type: ignore[arg-type]
    assert counted <= expected < (1.15 if checkpointing else 1.03) * counted


def _training_step(config: ModelConfig, *, trains_backbone: bool = True) -> tuple[float, float]:
    """Return the products that a step makes by torch's counter, and by the account."""
    token_ids = torch.arange(16).view(2, 8) % 11
    transformer = Transformer(config)
    freeze(
        transformer.named_parameters(),
        OptimizerConfig(backbone_multipliers=Multipliers(learning_rate=float(trains_backbone))),
    )
    with FlopCounterMode(display=False) as counter:
        transformer(token_ids).sum().backward()
    costs = account_of(config, unique_ids=11, trains_backbone=trains_backbone)
    return _counted(counter), token_ids.numel() * _matrix_products(costs.training_unique or costs.training_per_token)


def _counted(counter: FlopCounterMode) -> int:
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for operator, flops in counts.items() if "attention" not in str(operator))


def _matrix_products(flops: Flops) -> float:
    return flops.total - flops.attention_scores - flops.mixture


def test_attention_counts_every_query_and_the_keys_it_may_see() -> None:
    pairs = sum(position + 1 for position in range(8))  # causal
    for config, head_dim in ((TINY, 8), (MODELS["dense-llama"], 6)):
        per_pair = 2 * 2 * head_dim * config.num_heads  # score and weighted value
        assert 8 * forward_flops(config, sequence_length=8).attention_scores == config.num_layers * pairs * per_pair


def test_the_table_leaves_mole_the_flops_of_dense_router_and_mixture() -> None:
    dense = forward_flops(TINY, sequence_length=8)
    mole = lookup_flops(forward_flops(TINY_MOLE, sequence_length=8))
    assert mole.total - dense.total == TINY.num_layers * (2 * 16 * 3 + 2 * 16 * 3)


def test_moe_of_half_width_costs_what_dense_costs_but_for_router_and_mixture() -> None:
    dense, moe = (forward_flops(model_of(f"160m-{name}"), sequence_length=2048) for name in ("dense", "moe-10e"))
    assert moe.total - moe.router - moe.mixture == dense.total


@pytest.mark.parametrize(("tokens", "distinct"), [(16_384, 3_150), (131_072, 11_108)])
def test_the_estimate_of_distinct_ids_meets_what_was_measured(tokens: int, distinct: int) -> None:
    assert estimated_unique_ids(tokens, 50304) == pytest.approx(distinct, rel=0.005)


@pytest.mark.parametrize(("tokens", "vocab_size"), [(1, 257), (2, 257), (10**9, 257), (10**9, 50304)])
def test_the_estimate_exceeds_neither_tokens_nor_vocabulary(tokens: int, vocab_size: int) -> None:
    assert 1 <= estimated_unique_ids(tokens, vocab_size) <= min(tokens, vocab_size)


@pytest.mark.parametrize("unique_ids", [0, 17])
def test_impossible_numbers_of_distinct_ids_are_refused(unique_ids: int) -> None:
    with pytest.raises(ConfigError, match=f"unique ids: {unique_ids}, but a micro-batch of 16 tokens"):
        account_of(TINY_MOLE, unique_ids)


@pytest.mark.parametrize(("precision", "size"), [("bf16-mixed", 4), ("auto", 4), ("bf16-true", 2), ("64-true", 8)])
def test_training_memory_is_what_adamw_allocates(precision: str, size: int) -> None:
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[size]
    model = Transformer(TINY_MOLE).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randint(40, (2, 8))).sum().backward()
    optimizer.step()
    memory = whole_memory(count_parameters(TINY_MOLE).trained, precision)
    states = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert memory.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert memory.gradients == sum(
        parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None
    )
    assert memory.optimizer_states == sum(state.nbytes for state in states)
    assert memory.total == 4 * memory.weights


def test_frozen_weights_have_neither_gradients_nor_moments() -> None:
    config = replace(TINY_MOLE, expert_layers=[1], null_expert=True)
    whole, frozen = account_of(config), account_of(config, trains_backbone=False)
    experts, routers = 3 * 2 * 16 * 20 + 16, 4 * 16
    assert (frozen.parameters.trained, frozen.parameters.experts) == (experts + routers, experts)
    assert frozen.parameters.trained + frozen.parameters.frozen == whole.parameters.trained
    assert frozen.parameters.resident == whole.parameters.resident
    (memory,), alone = frozen.memory, whole.memory[0]  # none of FSDP2, which refuses it
    assert memory.weights == alone.weights
    assert (memory.gradients, memory.optimizer_states) == (4 * (experts + routers), 8 * (experts + routers))
    assert whole.parameters.loaded_per_token == 1 * 3 * 16


@pytest.mark.parametrize(("copies", "devices"), [(1, 4), (1, 5), (3, 4)])
@models
def test_sharded_memory_is_what_the_first_of_many_devices_holds(model: ModelConfig, copies: int, devices: int) -> None:
    torch.distributed.init_process_group("fake", rank=0, world_size=copies * devices, store=FakeStore())
    try:
        built = Transformer(model)
        mesh = init_device_mesh("cpu", (copies, devices), mesh_dim_names=("replicate", "shard"))
        shard_model(built, mesh["shard"] if copies == 1 else mesh)
        parts = [parameter.to_local().nbytes for parameter in built.parameters() if isinstance(parameter, DTensor)]
        assert len(parts) == len(list(built.parameters()))
    finally:
        torch.distributed.destroy_process_group()
    memory = sharded_memory(model, "32-true", devices)
    assert memory.weights == memory.gradients == memory.optimizer_states / 2 == sum(parts)
    vocabulary = (1 if model.tie_embeddings else 2) * model.vocab_size * model.hidden_size * 4
    assert 2 * vocabulary < memory.gathered <= 2 * 4 * count_parameters(model).trained
    halved = sharded_memory(model, "bf16-mixed", devices).gathered - 2 * vocabulary
    assert 0.75 * (memory.gathered - 2 * vocabulary) < halved < 0.8 * (memory.gathered - 2 * vocabulary)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_expert_memory_is_what_autograd_keeps_for_each_id(precision: str, activation: Activation) -> None:
    config = replace(TINY_MOLE, activation=activation)
    model = Transformer(config)
    kept = {num_ids: bytes_kept(model, num_ids, precision) for num_ids in (8, 24)}
    once = 16 * (config.hidden_size * 4 + 8)  # ids and embeddings, the same for all layers: too few to count
    accounted = expert_memory(config, "unique", 16, precision).kept_bytes
    assert kept[24] - kept[8] == accounted + once
    gradients = config.num_layers * 16 * config.num_experts * config.hidden_size * 4
    assert expert_memory(config, "unique_per_step", 16, precision).kept_bytes == accounted + gradients


def bytes_kept(model: Transformer, num_ids: int, precision: str) -> int:
    """What a forward pass over 30 positions with so many distinct ids leaves for the backward pass."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # held, so that its address stays its own
        storages[storage.data_ptr()] = storage
        return tensor

    token_ids = (torch.arange(30) % num_ids).view(2, 15)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled="16" in precision),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model.trunk(token_ids)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("name", ["160m-dense", "160m-moe-10e", "410m-mole-16e"])
def test_dry_run_reads_no_corpus_and_prints_and_writes_the_same_figures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("src.fit.prepare_corpus", None)
    written = tmp_path / "costs.json"
    train.main(["--config", str(PAPER / f"{name}.yaml"), "--dry-run", "--json", str(written)])
    shown, figures = capsys.readouterr().out, json.loads(written.read_text())
    trained = figures["parameters"]["trained"]
    assert f"{trained / 1e6:.4g} M" in shown or f"{trained / 1e9:.4g} G" in shown
    assert all(row["precision"] in shown for row in figures["offload"])
    assert figures["inference"]["total"] == sum(figures["inference"].values()) / 2
    assert "FLOPs per token" in shown and "AdamW's two moments" in shown


@pytest.mark.parametrize("native", ["bf16-mixed", "32-true"])
def test_the_dry_run_counts_in_the_precision_that_training_would_use(
    native: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.training.config.native_precision", Mock(return_value=native))
    written = [tmp_path / "auto.json", tmp_path / "native.json"]
    for path, precision in zip(written, ("auto", native), strict=True):
        options = ["--dry-run", "--json", str(path), f"trainer.precision={precision}"]
        train.main(["--config", str(PAPER / "160m-mole-4e.yaml"), *options])
    assert written[0].read_text() == written[1].read_text()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["trainer.devices=1"], "1, each of 16 windows of 256 tokens"),
        (["trainer.devices=2"], "1, each of 8 windows of 256 tokens"),
        (["trainer.devices=0,1", "trainer.num_nodes=2", "data.micro_batch_size=3"], "2, each of 2 windows"),
        (["trainer.devices=auto"], "1, each of 4 windows"),
        (["trainer.devices=auto", "trainer.accelerator=cpu"], "1, each of 16 windows"),
    ],
)
def test_the_dry_run_says_what_a_device_takes_at_a_time(
    options: list[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", Mock(return_value=True))
    monkeypatch.setattr("torch.cuda.device_count", Mock(return_value=4))
    train.main(["--dry-run", "trainer.precision=32-true", *options])
    said = " ".join(capsys.readouterr().out.split())
    assert f"Micro-batches of a device per optimizer step: {expected}" in said


def test_the_dry_runs_own_options_are_refused_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main(["--unique-ids", "5"])
    assert "--unique-ids and --json belong to --dry-run" in capsys.readouterr().err


def test_the_readmes_table_of_devices_is_what_the_dry_run_says() -> None:
    pattern = r"^\| ([0-9a-z]+-[0-9a-z-]+) \| ([\d,]+) M \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (.+) \|$"
    rows = re.findall(pattern, Path("configs/README.md").read_text(), re.MULTILINE)
    assert {row[0] for row in rows} == {path.stem for path in PAPER.glob("*.yaml")} - {"base"}
    for name, parameters, *memory, experts in rows:
        config = load_config(PAPER / f"{name}.yaml")
        costs = account(
            config.model,
            sequence_length=config.data.sequence_length,
            micro_batch_size=config.data.micro_batch_size,
            precision=config.trainer.precision,
        )
        assert parameters == f"{costs.parameters.trained / 1e6:,.0f}"
        assert memory == [f"{kind.total / GIB:.2f}" for kind in costs.memory]
        kept = {item.execution: item.kept_bytes / GIB for item in costs.expert_memory}
        assert experts == (f"{kept['unique']:.2f} ({kept['per_token']:.2f})" if kept else "-")
