"""Definitions of studies: those of the project load, arms included, and every mistake is one clear line."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from src.errors import ConfigError
from src.run_directory import RunDirectory
from src.studies.cells import Choice, best_value, cell_overrides, config_digest, reported_cells, search_cells
from src.studies.definition import Study, arm_config, load_study
from tests.conftest import CONFIGS
from tests.model.models import DENSE

STUDIES = sorted(CONFIGS.glob("studies/*/study.yaml"))
FROM_SCRATCH = [path for path in STUDIES if not path.parent.name.startswith("plugin")]
SMALL = f"""
question: Is it?
config: {CONFIGS}/quickstart.yaml
overrides: {{model: {{num_experts: 0}}, trainer: {{max_steps: 2}}}}
seeds: [0, 1]
baseline: dense
smallest_difference: 0.01
search: {{key: optimizer.learning_rate, values: [1e-3, 2e-3], seed: 7, families: {{one: dense}}}}
arms:
  dense: {{family: one}}
  mole: {{family: one, overrides: {{model: {{num_experts: 2, expert_permutation: "${{seed}}"}}}}}}
further_arms:
  wider: {{like: mole, seeds: [1], overrides: {{model: {{expert_intermediate_size: 64}}}}}}
hypotheses:
  - {{arm: mole, than: dense, expect: better, because: It reads more.}}
"""


@pytest.fixture
def places(tmp_path: Path) -> Mapping[str, str]:
    """A folder of text that nobody reads, and a run of which only the shape is known."""
    run = RunDirectory(tmp_path / "base")
    run.path.mkdir()
    run.write_config(
        {
            "model": replace(
                DENSE, vocab_size=4096, hidden_size=576, num_heads=8, num_layers=4, max_sequence_length=256
            ).to_dict()
        }
    )
    return {"corpus": "/no/such/folder", "base": str(run.path)}


def write(folder: Path, text: str = SMALL) -> Path:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.parent.name)
def test_every_study_loads_and_its_arms_are_configs(path: Path, places: Mapping[str, str]) -> None:
    study = load_study(path)
    configs = {name: arm_config(arm, places) for name, arm in study.arms.items()}
    assert study.baseline in configs
    assert study.hypotheses
    digests = {name: config_digest(config, study.arms[name]) for name, config in configs.items()}
    assert len(set(digests.values())) == len(digests), "two arms are the same run"


@pytest.mark.parametrize("path", FROM_SCRATCH, ids=lambda path: path.parent.name)
def test_arms_differ_in_model_and_losses_alone(path: Path, places: Mapping[str, str]) -> None:
    study = load_study(path)
    base = arm_config(study.arms[study.baseline], places).to_dict()
    for arm in study.arms.values():
        values = arm_config(arm, places).to_dict()
        changed = {section for section, value in values.items() if value != base[section]}
        steps_alone = "trainer" in changed and values["trainer"] == {**base["trainer"], "max_steps": 800}
        assert changed <= {"model", "objective"} | ({"trainer"} if steps_alone else set()), arm.name


def test_there_are_studies() -> None:
    assert [path.parent.name for path in STUDIES] == [
        "example",
        "family-code",
        "family-prose",
        "plugin",
        "plugin-smollm2",
    ]


def test_cells_come_seed_by_seed_and_required_arms_first(tmp_path: Path) -> None:
    study = load_study(write(tmp_path))
    names = [cell.name for cell in reported_cells(study, Choice())]
    assert names == ["dense-s0", "mole-s0", "dense-s1", "mole-s1", "wider-s1"]
    assert [cell.name for cell in reported_cells(study, Choice(arms=["mole", "wider"], seeds=[1]))] == names[3:]
    assert [cell.name for cell in search_cells(study, {"one"})] == ["dense-1e-3-s7", "dense-2e-3-s7"]
    assert best_value(study.search, "one", []) is None if study.search else False


def test_search_cells_alone_have_the_overrides_of_the_search(tmp_path: Path) -> None:
    shorter = "seed: 7, overrides: {trainer: {max_steps: 3}, evaluation: {corpora: []}},"
    study = load_study(write(tmp_path, SMALL.replace("seed: 7,", shorter)))
    (searched, *_), (reported, *_) = search_cells(study, {"one"}), reported_cells(study, Choice())
    assert set(searched.arm.overrides) - set(reported.arm.overrides) == {"trainer.max_steps=3", "evaluation.corpora=[]"}
    assert "trainer.max_steps=3" in cell_overrides(study, searched, Choice(), None, tmp_path)


def test_a_cells_config_has_its_seed_its_order_and_the_best_value(tmp_path: Path) -> None:
    study = load_study(write(tmp_path))
    (cell,) = reported_cells(study, Choice(arms=["mole"], seeds=[1]))
    choice = Choice(overrides=["trainer.max_steps=5"])
    config = arm_config(cell.arm, {}, cell_overrides(study, cell, choice, "2e-3", tmp_path))
    assert (config.seed, config.data.shuffle_seed, config.data.seed, config.name) == (1, 1, 0, "mole-s1")
    assert (config.optimizer.learning_rate, config.trainer.max_steps) == (2e-3, 5)
    assert (config.model.expert_permutation, config.output_dir) == (1, str(tmp_path))


def test_a_digest_is_of_what_decides_numbers(tmp_path: Path) -> None:
    study = load_study(write(tmp_path))

    def digest(*overrides: str) -> str:
        return config_digest(arm_config(study.arms["dense"], {}, overrides))

    same = ("name=a", "output_dir=b", "data.cache_dir=c", "wandb.mode=offline", "trainer.enable_progress_bar=true")
    assert digest(*same) == digest()
    for change in ("seed=3", "model.norm_eps=1e-6", "trainer.precision=64-true", "data.validation_windows=3"):
        assert digest(change) != digest()
    scaled = [digest(f"model.rope_scaling={values}") for values in ("null", "{}", "{factor: 4}")]
    assert scaled[0] == digest()
    assert len(set(scaled)) == 3
    files = [digest(f"data.files=[{folder}/a.txt]") for folder in ("one", "two")]
    assert files[0] == files[1] != digest()


def test_a_corpus_is_named_where_one_is_needed(tmp_path: Path) -> None:
    text = SMALL.replace("trainer: {max_steps: 2}", 'data: {files: ["${corpus}/*.txt"]}')
    study: Study = load_study(write(tmp_path, text))
    with pytest.raises(ConfigError, match="corpus=DIR"):
        arm_config(study.arms["dense"], {})
    assert arm_config(study.arms["dense"], {"corpus": "/texts"}).data.files == ["/texts/*.txt"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("question:", "qestion:", "unknown key 'qestion'; did you mean 'question'?"),
        ("question: Is it?", "", "question is required; give it a value"),
        ("baseline: dense", "baseline: moe", "baseline: 'moe', but it must be an arm: dense, mole, wider"),
        ("like: mole,", "like: moel,", "arms.wider.like: 'moel', but it must be an arm: dense, mole"),
        ("like: mole,", "lik: mole,", "unknown key 'arms.wider.lik'; did you mean 'arms.wider.like'?"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "seeds: ['0', '0'] has a seed twice; remove one"),
        ("seeds: [0, 1]", "seeds: []", "seeds: [], but it must be whole numbers from 0 to 4294967295"),
        ("seed: 7", "seed: 1", "search.seed: 1 is a reported seed; choose another"),
        ("smallest_difference: 0.01", "smallest_difference: -1", "smallest_difference: '-1', but it must be a number"),
        ("dense: {family: one}", "dense: {family: two}", "arms.dense.family: 'two', but it must be one of one"),
        ("expect: better", "expect: best", "hypotheses[0].expect: 'best', but it must be one of"),
        ("  wider:", "  Wi der:", "further_arms.Wi der: must be a new name"),
        ("  dense: {family: one}", "  dense: 3", "arms.dense: '3', but it must be keys with values"),
        ("values: [1e-3, 2e-3],", "", "search.values is required; give it a value"),
    ],
)
def test_a_mistake_gets_one_clear_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write(tmp_path, SMALL.replace(old, new, 1))
    with pytest.raises(ConfigError) as error:
        load_study(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_files_that_are_no_studies(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing.yaml: no such study"):
        load_study(tmp_path / "missing.yaml")
    for text, message in (("a: [", "not valid YAML"), ("- 1", "must be keys with values"), ("\0", "not valid YAML")):
        with pytest.raises(ConfigError, match=message):
            load_study(write(tmp_path, text))
