"""The ready configs: each loads, states its paper's recipe, changes what it says and nothing else, and trains."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from src.config import RunConfig, load_config
from src.run_directory import RunDirectory
from src.train import train
from tests.conftest import CONFIGS, STDLIB

PAPER = CONFIGS / "paper"
EVERY_CONFIG = sorted(set(CONFIGS.rglob("*.yaml")) - set(CONFIGS.rglob("study.yaml")))
PAPER_CONFIGS = sorted(PAPER.rglob("*.yaml"))

SIZES_410M = {
    "model.hidden_size": 1024,
    "model.num_layers": 24,
    "model.num_heads": 16,
    "model.intermediate_size": 4096,
    "optimizer.learning_rate": 3e-4,
}
SIZES_1B = {
    "model.hidden_size": 2048,
    "model.num_layers": 16,
    "model.num_heads": 8,
    "model.intermediate_size": 8192,
    "optimizer.learning_rate": 3e-4,
    "data.micro_batch_size": 4,
}


def moe(width: int) -> dict[str, object]:
    return {
        "model.intermediate_size": 0,
        "model.num_experts": 10,
        "model.expert_intermediate_size": width,
        "model.expert_input": "hidden",
        "model.top_k": 2,
        "objective.load_balance_weight": 0.01,
        "objective.z_loss_weight": 0.001,
    }


def mole(width: int) -> dict[str, object]:
    return {"model.num_experts": 4, "model.expert_intermediate_size": width}


DIFFERENCES: dict[str, tuple[str, Mapping[str, object]]] = {
    "160m-dense": ("base", {}),
    "160m-moe-10e": ("160m-dense", moe(1536)),
    "160m-mole-4e": ("160m-dense", mole(3072)),
    "160m-moe-34e": ("160m-moe-10e", {"model.num_experts": 34}),
    "160m-mole-16e": ("160m-mole-4e", {"model.num_experts": 16}),
    "410m-dense": ("160m-dense", SIZES_410M),
    "410m-moe-10e": ("410m-dense", moe(2048)),
    "410m-mole-4e": ("410m-dense", mole(4096)),
    "410m-moe-34e": ("410m-moe-10e", {"model.num_experts": 34}),
    "410m-mole-16e": ("410m-mole-4e", {"model.num_experts": 16}),
    "1b-dense": ("160m-dense", SIZES_1B),
    "1b-moe-10e": ("1b-dense", moe(4096)),
    "1b-mole-4e": ("1b-dense", mole(8192)),
    "ablations/table4-load-balance": ("160m-mole-16e", {"objective.load_balance_weight": 0.01}),
    "ablations/table4-load-balance-z-loss": (
        "160m-mole-16e",
        {"objective.load_balance_weight": 0.01, "objective.z_loss_weight": 0.001},
    ),
    "ablations/table5-expert-width-768": ("160m-mole-16e", {"model.expert_intermediate_size": 768}),
    "ablations/table5-expert-width-12288": ("160m-mole-16e", {"model.expert_intermediate_size": 12288}),
    "ablations/table6-experts-2": ("160m-mole-4e", {"model.num_experts": 2}),
    "ablations/table6-experts-8": ("160m-mole-4e", {"model.num_experts": 8}),
    "ablations/table6-experts-32": ("160m-mole-4e", {"model.num_experts": 32}),
    "ablations/table7-full-activation": (
        "160m-moe-10e",
        {"model.top_k": None, "objective.load_balance_weight": 0.0, "objective.z_loss_weight": 0.0},
    ),
    "ablations/table7-shared-expert": (
        "ablations/table7-full-activation",
        {"model.intermediate_size": 3072, "model.num_experts": 4, "model.expert_intermediate_size": 3072},
    ),
    "ablations/init-unscaled": ("160m-mole-4e", {"model.scale_output_init": False}),
}
"""Config: what it is compared with, and every key that differs besides the name."""


def flatten(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def resolved(name: str) -> dict[str, object]:
    return dict(flatten(load_config(PAPER / f"{name}.yaml").to_dict()))


def changed(name: str, reference: str) -> dict[str, object]:
    """Return the keys of `name` whose values differ from those of `reference`, but for the name."""
    theirs = resolved(reference)
    return {key: value for key, value in resolved(name).items() if key != "name" and value != theirs[key]}


def load(path: Path, tmp_path: Path) -> RunConfig:
    """Load a config; one that says so starts from a run, which has a model."""
    if "`init_from=RUN`" not in path.read_text():
        return load_config(path)
    RunDirectory(tmp_path).write_config({"model": load_config(CONFIGS / "quickstart.yaml").model.to_dict()})
    return load_config(path, [f"init_from={tmp_path}"])


@pytest.mark.parametrize("path", EVERY_CONFIG, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_loads_and_is_named_after_its_file(path: Path, tmp_path: Path) -> None:
    assert load(path, tmp_path).name == ("paper-base" if path.stem == "base" else path.stem)


@pytest.mark.parametrize("path", EVERY_CONFIG, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_runs_on_1_2_4_and_8_devices(path: Path, tmp_path: Path) -> None:
    data = load(path, tmp_path).data
    for world_size in (1, 2, 4, 8):
        passes, windows = data.micro_batches_per_step(world_size), data.micro_batch_windows(world_size)
        assert passes * windows * world_size == data.global_batch_size
        assert windows == min(data.micro_batch_size, data.global_batch_size // world_size)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_changes_what_it_says_and_nothing_else(name: str) -> None:
    reference, expected = DIFFERENCES[name]
    assert changed(name, reference) == expected


def test_every_paper_config_is_compared_with_another() -> None:
    names = {str(path.relative_to(PAPER).with_suffix("")) for path in PAPER_CONFIGS}
    assert names == {*DIFFERENCES, "base"}


def test_the_last_step_of_table_7_lets_experts_read_embeddings() -> None:
    assert changed("160m-mole-4e", "ablations/table7-shared-expert") == {"model.expert_input": "embedding"}


def test_no_two_configs_describe_the_same_run() -> None:
    runs = [tuple(sorted((k, str(v)) for k, v in resolved(name).items() if k != "name")) for name in DIFFERENCES]
    assert len(set(runs)) == len(runs)


def test_the_base_states_the_papers_recipe() -> None:
    recipe = {
        "model.vocab_size": 50304,
        "model.max_sequence_length": 2048,
        "model.rope_theta": 10000.0,
        "model.norm_eps": 1e-5,
        "model.init_std": 0.01,
        "model.scale_output_init": True,
        "data.sequence_length": 2048,
        "data.global_batch_size": 1024,
        "optimizer.learning_rate": 6e-4,
        "optimizer.schedule": "cosine",
        "optimizer.min_learning_rate_ratio": 0.1,
        "optimizer.warmup_steps": 500,
        "optimizer.weight_decay": 0.01,
        "optimizer.beta1": 0.9,
        "optimizer.beta2": 0.95,
        "optimizer.epsilon": 1e-8,
        "optimizer.gradient_clip_norm": 1.0,
        "optimizer.backbone_multipliers.learning_rate": 1.0,
        "optimizer.backbone_multipliers.weight_decay": 1.0,
        "optimizer.embedding_multipliers.learning_rate": 1.0,
        "optimizer.embedding_multipliers.weight_decay": 1.0,
        "optimizer.expert_multipliers.learning_rate": 1.0,
        "optimizer.expert_multipliers.weight_decay": 1.0,
        "objective.load_balance_weight": 0.0,
        "objective.z_loss_weight": 0.0,
        "trainer.max_steps": 50_000,
        "trainer.precision": "bf16-mixed",
        "trainer.compile": True,
    }
    base = resolved("base")
    assert {key: base[key] for key in recipe} == recipe


def shrunk(path: Path, more: Sequence[str]) -> list[str]:
    """Overrides that make a paper config two optimizer steps of a second, keeping its architecture and objective."""
    model = load_config(path).model
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 300, "max_sequence_length": 32}
    sizes["intermediate_size"] = 96 if model.intermediate_size else 0
    if model.num_experts:
        sizes["expert_intermediate_size"] = 48
    return [
        *(f"model.{key}={value}" for key, value in sizes.items()),
        "data.sequence_length=16",
        "data.global_batch_size=4",
        "data.micro_batch_size=2",
        "data.validation_windows=2",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        "trainer.log_every_n_steps=1",
        "trainer.precision=32-true",
        "trainer.compile=false",  # which takes a minute
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        "trainer.enable_progress_bar=false",
        "evaluation.at_fit_end=false",
        "wandb.mode=disabled",
        *more,
    ]


def assert_trains_two_steps(path: Path, more: Sequence[str]) -> None:
    """Train, and find the weights, and the table where there is one."""
    run_dir = train(load_config(path, shrunk(path, more))).run_dir
    metrics = (run_dir / "metrics.csv").read_text()
    assert (run_dir / "backbone.safetensors").is_file()
    is_mole = load_config(path).model.architecture == "mole"
    assert (run_dir / "lut" / "manifest.json").is_file() == (run_dir / "experts.safetensors").is_file() == is_mole
    assert "train/loss" in metrics and "nan" not in metrics


@pytest.mark.parametrize("name", ["160m-mole-4e", "ablations/table7-shared-expert"])
def test_a_shrunk_config_trains_two_steps(name: str, tmp_path: Path, cache_dir: Path) -> None:
    corpus = [f"data.files=[{STDLIB}/json/*.py,{STDLIB}/email/*.py,{STDLIB}/http/*.py]", "data.validation_fraction=0.1"]
    assert_trains_two_steps(PAPER / f"{name}.yaml", [*corpus, f"data.cache_dir={cache_dir}", f"output_dir={tmp_path}"])


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.parametrize("path", PAPER_CONFIGS, ids=lambda path: str(path.relative_to(PAPER)))
def test_every_shrunk_config_trains_two_steps_on_the_embedded_corpus(
    path: Path, tmp_path: Path, cache_dir: Path
) -> None:
    assert_trains_two_steps(path, [f"data.cache_dir={cache_dir}", f"output_dir={tmp_path}"])
