"""Configs: composition, and one clear line for every mistake."""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest
import yaml

from src import generate, prepare_data, verify
from src.benchmarks.workload import read_texts
from src.cli import parser
from src.config import RunConfig, _hint, _keys, describe, load_config, load_run_config
from src.data.config import SourceConfig
from src.errors import ConfigError, RunError
from src.evaluation.held_out import EvaluationCorpus
from src.run_directory import PATH_KEYS, PATH_OR_NAME_KEYS, RunDirectory
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
            "command line: trainer.max_steps: 'many', but it must be a whole number of at most 63 bits",
        ),
        (
            "wandb.mode=on",
            "command line: wandb.mode: 'on', but it must be one of auto, online, offline, disabled",
        ),
        (
            "model=3",
            "command line: model: found '3', but it is a section; set its keys, such as model.KEY=VALUE",
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
        ("data.micro_batch_size=0", f"{QUICKSTART}: data.micro_batch_size: 0, but it must be at least 1"),
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
    config: RunConfig = load_config(QUICKSTART, ["seed=3", "data.files=[/a.txt]", "output_dir=/b", "data.cache_dir=/c"])
    run = RunDirectory(tmp_path)
    run.write_config(config.to_dict())
    assert load_run_config(run) == config
    run.config_path.write_text(run.config_path.read_text().replace("schema_version: 1", "schema_version: 9"))
    with pytest.raises(RunError, match=r"config.yaml: schema_version 9, but this version reads 1"):
        load_run_config(run)


def value_at(config: object, key: str) -> object:
    for name in key.split("."):
        config = getattr(config, name)
    return config


TYPED = (
    "12e5",
    "no",
    "12e5678",
    "1_0",
    "0x10",
    "1:30",
    ".nan",
    "~",
    "Null",
    "2024-01-01",
    "a: b",
    "- x",
    "[a",
    "*x",
    " x ",
)
"""Text that YAML takes for something else, or refuses."""
TEXT_KEYS = (
    "name",
    "data.tokenizer.hub",
    "evaluation.sample_prompt",
    "wandb.entity",
)


@pytest.mark.parametrize("key", TEXT_KEYS)
def test_a_key_of_type_text_keeps_what_was_typed(tmp_path: Path, key: str) -> None:
    section, _, leaf = key.rpartition(".")
    for text in TYPED:
        assert value_at(load_config(QUICKSTART, [f"{key}={text}"]), key) == text
        if text.isascii() and not text.startswith(("-", "[", "*", " ")) and ": " not in text:
            lines = [*(f"{'  ' * depth}{name}:" for depth, name in enumerate(section.split(".")) if name)]
            lines.append(f"{'  ' * len(lines)}{leaf}: {text}")
            file = write(tmp_path / "text.yaml", "\n".join([f"base: {QUICKSTART}", *lines]))
            assert value_at(load_config(file), key) == text
    assert value_at(load_config(QUICKSTART, [f"{key}='12'"]), key) == "12"
    assert value_at(load_config(QUICKSTART, [f"{key}=a-${{seed}}", "seed=7"]), key) == "a-7"
    is_optional = key in ("data.tokenizer.hub", "evaluation.local_data", "wandb.entity")
    assert value_at(load_config(QUICKSTART, [f"{key}=null"]), key) == (None if is_optional else "null")
    assert value_at(load_config(QUICKSTART, [f"{key}='null'"]), key) == "null"


def test_text_in_lists_and_sections_keeps_what_was_typed(tmp_path: Path) -> None:
    config = load_config(
        QUICKSTART,
        [
            "data.sources=[{hub: 1e3, subset: no, revision: 12e5678, split: 0x1}, {files: /12:30, name: null}]",
            "wandb.tags=[on, 1.0, null]",
        ],
    )
    first, second = config.data.sources
    assert (first.hub, first.subset, first.revision, first.split) == ("1e3", "no", "12e5678", "0x1")
    assert (second.files, second.name) == (["/12:30"], None)
    assert config.wandb.tags == ["on", "1.0", "null"]
    run = RunDirectory(tmp_path)
    run.write_config(config.to_dict())
    assert load_run_config(run).data.sources == config.data.sources


@pytest.mark.parametrize("time", ["1:00:00:00", "00:00:04:00", "12:34:56:07"])
def test_a_time_is_read_as_it_is_written(tmp_path: Path, time: str) -> None:
    assert load_config(QUICKSTART, [f"trainer.max_time={time}"]).trainer.max_time == time
    file = write(tmp_path / "time.yaml", f"base: {QUICKSTART}\ntrainer:\n  max_time: {time}\n")
    assert load_config(file).trainer.max_time == time
    with pytest.raises(ConfigError, match=r"trainer.max_time: '1:00:00', but it must be DD:HH:MM:SS"):
        load_config(QUICKSTART, ["trainer.max_time=1:00:00"])


def test_a_runs_own_config_is_a_config(tmp_path: Path) -> None:
    overrides = ["seed=3", r"evaluation.sample_prompt=\${HOME} \\\${x}", "data.sources={files: /a/*.txt, name: no}"]
    config = load_config(QUICKSTART, [*overrides, f"output_dir={tmp_path}", f"data.cache_dir={tmp_path}"])
    assert config.evaluation.sample_prompt == r"${HOME} \${x}"
    run = RunDirectory(tmp_path)
    run.write_config(config.to_dict())
    assert load_config(run.config_path) == load_run_config(run) == config
    child = write(tmp_path / "child.yaml", "base: config.yaml\nseed: 4\n")
    assert load_config(child) == replace(config, seed=4)
    run.config_path.write_text(run.config_path.read_text().replace("schema_version: 1", "schema_version: 9"))
    with pytest.raises(ConfigError, match=r"config.yaml: schema_version 9, but this version reads 1"):
        load_config(child)


def test_one_value_is_a_list_of_one(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, ["data.files=[x].txt", "wandb.tags=one: two", "evaluation.tasks=next_passage"])
    assert (config.data.files, config.wandb.tags) == (["[x].txt"], ["one: two"])
    assert config.evaluation.tasks == ["next_passage"]
    file = write(tmp_path / "one.yaml", f"base: {QUICKSTART}\ndata:\n  sources: {{files: a.txt}}\n")
    assert load_config(file).data.sources[0].files == ["a.txt"]
    tags = ["wandb.tags=${evaluation.tasks}", "data.files=${name}.txt"]
    assert load_config(QUICKSTART, tags).wandb.tags == ["next_passage", "repeated_word"]
    assert load_config(QUICKSTART, tags).data.files == ["quickstart.txt"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1.5", "command line: seed: '1.5', but it must be a whole number"),
        ("seed=[1]", "command line: seed: '[1]', but it must be a whole number"),
        (f"seed={'9' * 5000}", "command line: seed: '99999"),
        ("seed=${name}", f"{QUICKSTART}: seed: 'quickstart', but it must be a whole number"),
        ("seed=${nope}", f"{QUICKSTART}: seed: Interpolation key 'nope' not found"),
        ("seed=${", "command line: seed: no viable alternative"),
        ("trainer.compile=maybe", "command line: trainer.compile: 'maybe', but it must be true or false"),
        ("trainer.compile=${name}", f"{QUICKSTART}: trainer.compile: 'quickstart', but it must be true or false"),
        ("optimizer.beta1=", "command line: optimizer.beta1: '', but it must be a number"),
        ("model.top_k=x", "command line: model.top_k: 'x', but it must be a whole number of at most 63 bits, or null"),
        ("data.tokenizer.path=", "command line: data.tokenizer.path: '', but it must be text, or null"),
        ("data.files=", "command line: data.files[0]: '', but it must be text"),
        ("data.sources=[x]", "command line: data.sources[0]: found 'x', but it is a section"),
        ("data.sources={files: {a: b}}", "command line: data.sources[0].files[0]: keys with values, but it must be te"),
        ("wandb.mode=${name}", f"{QUICKSTART}: wandb.mode: 'quickstart', but it must be one of auto, online"),
        ("name=\udcff", "command line: name: '\\udcff', but it must be text"),
    ],
)
def test_values_of_the_wrong_type_name_key_value_and_what_is_right(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(QUICKSTART, [override])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_values_of_the_wrong_type_in_files_name_the_file(tmp_path: Path) -> None:
    for text, message in (
        ("seed: [1]", r"wrong.yaml: seed: a list, but it must be a whole number"),
        ("name: {a: 1}", r"wrong.yaml: name: keys with values, but it must be text"),
        ("seed: 1\nseed: 2", r"wrong.yaml: seed: given twice; remove one"),
        ("base: [a]", r"wrong.yaml: base: a list, but it must be text"),
        ("[" * 5000, r"wrong.yaml: not valid YAML"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(write(tmp_path / "wrong.yaml", text))


KINDS = {key: next(iter(get_args(hint)), hint) for key in _keys(RunConfig) if (hint := _hint(key)) is not None}
FLOAT_KEYS = [key for key, kind in KINDS.items() if kind is float]
INT_KEYS = [key for key, kind in KINDS.items() if kind is int]


@pytest.mark.parametrize("key", FLOAT_KEYS)
def test_no_hyperparameter_is_nan_or_infinite(key: str) -> None:
    for text in ("nan", ".inf", "-.inf", "1e400", "1e39"):
        with pytest.raises(ConfigError, match=rf"{key}: [-.einfa+\d]+, but it must be"):
            load_config(QUICKSTART, [f"{key}={text}"])


def test_nothing_in_a_source_is_nan_or_infinite() -> None:
    for weight in ("nan", ".inf", "-1", "0"):
        with pytest.raises(ConfigError, match=r"weight \S+, but it must be above 0"):
            load_config(QUICKSTART, [f"data.sources={{hub: a, weight: {weight}}}"])


@pytest.mark.parametrize("key", [*INT_KEYS, "evaluation.corpora[0].windows"])
def test_no_whole_number_is_too_large_or_negative(key: str) -> None:
    for number in (2**63, -(2**63) + 1, -2):
        override = f"{key}={number}"
        if "[" in key:
            override = f"evaluation.corpora={{name: a, files: b, windows: {number}}}"
        with pytest.raises(ConfigError, match=r", but (it must be|a byte-level|the cosine)") as error:
            load_config(QUICKSTART, [override])
        assert key.rpartition(".")[2] in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vocab_size=9007199254740992", "model.vocab_size: 9007199254740992, but it must be"),
        ("model.hidden_size=2147483648", "model.hidden_size: 2147483648, but it must be"),
        ("model.num_layers=2147483648", "model.num_layers: 2147483648, but it must be"),
        ("data.num_workers=1000000", "data.num_workers: 1000000, but it must be"),
        ("data.prepare_processes=1000000", "data.prepare_processes: 1000000, but it must be"),
        ("trainer.num_nodes=2147483648", "trainer.num_nodes: 2147483648, but it must be"),
        ("trainer.devices=two", "trainer.devices: 'two', but it must be a number such as 2"),
        ("trainer.devices=0", "trainer.devices: '0', but it must be a number such as 2"),
        ("trainer.max_time=99999999999999:00:00:00", "trainer.max_time: '99999999999999:00:00:00', but it must be"),
        ("name=..", "name: '..', but it must be a directory name"),
        (f"name={'x' * 201}", "name: 'xxxx"),
    ],
)
def test_values_that_no_machine_can_use_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(QUICKSTART, [override])
    assert str(error.value).startswith(f"{QUICKSTART}: {message}")


def test_a_tilde_is_the_home_directory_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text(f"base: {Path(QUICKSTART).resolve()}\ncheckpoint: {{}}\ninit_from: ~/weights\n")
    (tmp_path / "mine.yaml").write_text(
        "base: ~/base.yaml\n"
        "output_dir: ~/runs/${name}\n"
        "data: {cache_dir: ~/cache, sources: [{files: [~/a.txt, b~.txt]}, {hub: ~/set}], tokenizer: {path: ~/t.json}}\n"
        "evaluation: {local_data: ~/tasks, corpora: [{name: ~/x, files: [~/c.txt]}]}\n"
    )
    config = load_config("~/mine.yaml", ["name=~n"])
    assert config.output_dir == f"{tmp_path}/runs/~n"
    assert config.init_from == f"{tmp_path}/weights"
    assert config.data.cache_dir == f"{tmp_path}/cache"
    assert config.data.tokenizer.path == f"{tmp_path}/t.json"
    assert [source.files for source in config.data.sources] == [[f"{tmp_path}/a.txt", "b~.txt"], []]
    assert config.data.sources[1].hub == f"{tmp_path}/set"
    assert config.evaluation.local_data == f"{tmp_path}/tasks"
    assert [(corpus.name, corpus.files) for corpus in config.evaluation.corpora] == [("~/x", [f"{tmp_path}/c.txt"])]
    typed = load_config(QUICKSTART, ["output_dir=~/r", "data.files=~/d.txt", "evaluation.sample_prompt=~/p"])
    assert (typed.output_dir, typed.data.files) == (f"{tmp_path}/r", [f"{tmp_path}/d.txt"])
    assert typed.evaluation.sample_prompt == "~/p"
    assert load_config(QUICKSTART, ["output_dir=~nobody-here/r"]).output_dir == "~nobody-here/r"


def test_path_keys_are_all_that_name_paths() -> None:
    """A new key whose meaning speaks of a path, file or folder must be added to the list or stated here."""
    leaves = set(re.findall(r"^ *(\w+):", describe(load_config(QUICKSTART)), re.MULTILINE))
    for section in (SourceConfig, EvaluationCorpus):
        leaves |= {item.name for item in fields(section)}
    assert leaves >= PATH_KEYS | PATH_OR_NAME_KEYS
    named = {
        leaf for leaf in leaves if any(word in leaf for word in ("dir", "path", "file", "folder", "local", "from"))
    }
    assert named <= PATH_KEYS


@pytest.mark.parametrize("text", ["~/run", "~"])
def test_a_tilde_is_the_home_directory_in_paths_of_verbs(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RunError, match=str(tmp_path)):
        verify.main([f"--run={text}"])
    with pytest.raises(RunError, match=str(tmp_path)):
        generate.main([f"--run={text}", "--prompt", "~"])
    with pytest.raises(ConfigError, match=f"{tmp_path}"):
        prepare_data.main([f"--config={text}"])
    options = parser("x", "y", "z")
    options.add_argument("--path", type=Path, nargs="+")
    assert options.parse_args(["--path", text, "a"]).path == [Path(text.replace("~", str(tmp_path))), Path("a")]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "t.txt").write_text("text")
    assert list(read_texts(["~/corpus/*.txt"])) == list(read_texts(["~/corpus"])) == ["text"]
