"""Configs: composition, and one clear line for every mistake."""

from pathlib import Path

import pytest
import yaml

from src.config import RunConfig, describe, load_config, load_run_config
from src.errors import ConfigError, RunError
from src.run_directory import RunDirectory
from tests.conftest import CONFIGS

QUICKSTART = CONFIGS / "quickstart.yaml"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_later_layers_win(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", f"base: {QUICKSTART}\nseed: 1\ntrainer: {{max_steps: 7}}\n")
    child = write(tmp_path / "child.yaml", "base: base.yaml\nseed: 2\n")
    config = load_config(child, ["name=third"])
    assert (config.seed, config.trainer.max_steps, config.name) == (2, 7, "third")
    assert config.optimizer.beta2 == 0.95  # a default in code
    assert config.data.tokenizer.vocab_size == config.model.vocab_size == 4096  # interpolation


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_step=3", "command line: unknown key 'trainer.max_step'; did you mean 'trainer.max_steps'?"),
        ("max_steps=3", "command line: unknown key 'max_steps'; did you mean 'trainer.max_steps'?"),
        ("modle.top_k=1", "command line: unknown key 'modle'; did you mean 'model'?"),
        (
            "trainer.max_steps=many",
            "command line: trainer.max_steps: Value 'many' of type 'str' could not be converted to Integer",
        ),
        (
            "wandb.mode=on",
            "command line: wandb.mode: Invalid value 'True', expected one of ['auto', 'online', 'offline', 'disabled']",
        ),
        (
            "model=3",
            "command line: model: found 3, but it is a section; set its keys, such as model.KEY=VALUE",
        ),
        ("seed", "'seed': not an override; write key=value, such as trainer.max_steps=100"),
        (
            "model.num_heads=3",
            f"{QUICKSTART}: model.num_heads: 3 heads do not divide model.hidden_size 256 into an even head "
            "dimension; change one of them",
        ),
        (
            "data.sequence_length=1024",
            f"{QUICKSTART}: data.sequence_length: 1024 exceeds model.max_sequence_length (512); change one of them",
        ),
        (
            "data.micro_batch_size=5",
            f"{QUICKSTART}: data.global_batch_size: 16 is not a multiple of data.micro_batch_size (5); "
            "change one of them",
        ),
        ("seed=-1", f"{QUICKSTART}: seed: -1, but it must be at least 0 and at most 4294967295"),
        ("seed=5000000000", f"{QUICKSTART}: seed: 5000000000, but it must be at least 0 and at most 4294967295"),
        ("data.seed=-1", f"{QUICKSTART}: data.seed: -1, but it must be at least 0"),
        ("model.init_std=.inf", f"{QUICKSTART}: model.init_std: inf, but it must be at least 0"),
        ("model.rope_theta=.nan", f"{QUICKSTART}: model.rope_theta: nan, but it must be above 0"),
        ("optimizer.learning_rate=.nan", f"{QUICKSTART}: optimizer.learning_rate: nan, but it must be above 0"),
        ("optimizer.beta2=1", f"{QUICKSTART}: optimizer.beta2: 1.0, but it must be at least 0 and below 1"),
        ("optimizer.epsilon=.inf", f"{QUICKSTART}: optimizer.epsilon: inf, but it must be at least 0"),
        (
            "optimizer.expert_multipliers.learning_rate=.inf",
            f"{QUICKSTART}: optimizer.expert_multipliers.learning_rate: inf, but it must be at least 0",
        ),
        ("objective.z_loss_weight=.inf", f"{QUICKSTART}: objective.z_loss_weight: inf, but it must be at least 0"),
        ("checkpoint.ema_decay=.nan", f"{QUICKSTART}: checkpoint.ema_decay: nan, but it must be above 0 and below 1"),
        ("trainer.limit_val_batches=-1", f"{QUICKSTART}: trainer.limit_val_batches: -1, but it must be at least 0"),
        (
            "lut.dtype=int2",
            f"{QUICKSTART}: lut.dtype: 'int2', but it must be one of ",
        ),
        (
            "trainer.max_time=4m",
            f"{QUICKSTART}: trainer.max_time: '4m', but it must be DD:HH:MM:SS, such as \"00:00:04:00\"",
        ),
    ],
)
def test_a_mistake_gets_one_clear_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(QUICKSTART, [override])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_mistakes_in_files_name_the_file(tmp_path: Path) -> None:
    unknown = write(tmp_path / "unknown.yaml", f"base: {QUICKSTART}\nmodel: {{num_expert: 2}}\n")
    with pytest.raises(
        ConfigError, match=r"unknown.yaml: unknown key 'model.num_expert'; did you mean 'model.num_experts'"
    ):
        load_config(unknown)
    with pytest.raises(ConfigError, match=r"missing.yaml: no such config file; see configs/"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match=r"broken.yaml: not valid YAML"):
        load_config(write(tmp_path / "broken.yaml", "model: [\n"))
    with pytest.raises(ConfigError, match=r"list.yaml: holds no `key: value` pairs"):
        load_config(write(tmp_path / "list.yaml", "- 1\n"))
    with pytest.raises(ConfigError, match=r"circle.yaml: its base files form a cycle"):
        load_config(write(tmp_path / "circle.yaml", "base: circle.yaml\n"))
    with pytest.raises(ConfigError, match=r"bare.yaml: name is required"):
        load_config(write(tmp_path / "bare.yaml", "seed: 1\n"))


def test_description_is_the_config_with_a_meaning_for_every_key() -> None:
    config = load_config(QUICKSTART)
    text = describe(config)
    assert yaml.safe_load(text) == config.to_dict()
    lines = text.splitlines()
    for line, above in zip(lines[1:], lines, strict=False):
        if ":" in line and not line.lstrip().startswith(("#", "-")):
            assert above.lstrip().startswith("#") or "#" in line, f"no meaning above {line!r}"


def test_a_run_gives_its_config_back(tmp_path: Path) -> None:
    config: RunConfig = load_config(QUICKSTART, ["seed=3", "data.files=[a.txt]"])
    run = RunDirectory(tmp_path)
    run.write_config(config.to_dict())
    assert load_run_config(run) == config
    run.config_path.write_text(run.config_path.read_text().replace("schema_version: 1", "schema_version: 9"))
    with pytest.raises(RunError, match=r"config.yaml: schema_version 9, but this version reads 1"):
        load_run_config(run)
