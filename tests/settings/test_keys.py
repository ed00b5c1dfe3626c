"""Every key of the config gets values of every kind; whether each is taken or refused is written here."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import cast, get_args, get_type_hints

import pytest
import torch
import yaml

from src import prepare_data, train
from src.config import RunConfig
from tests.conftest import CONFIGS
from tests.settings.verdicts import (
    HUGE,
    LARGEST,
    LM_EVAL_WORDS,
    REFUSED,
    TEXTS,
    RunVerb,
    Verdicts,
    choice,
    number,
    require_refused,
    whole,
)

CONFIG = ("--config", str(CONFIGS / "quickstart.yaml"))
SWITCH = Verdicts({"true": True, "false": False, "yes": True, "off": False})
TEXT = Verdicts({text: text for text in TEXTS})
TEXT_OR_NULL = Verdicts({**TEXT.accepted, "null": None})
LIST = Verdicts({**{text: [text] for text in TEXTS}, "[1, 2]": ["1", "2"], "[]": []}, ["[[1]]", "[a, {b: 1}]"])
COUNT = whole(f"1 {LARGEST}")
COUNT_OR_NULL = whole(f"1 {LARGEST}", or_null=True)
NOT_NEGATIVE = number(f"0 1 1.5 1e-30 {LARGEST} {HUGE}")

KEYS: dict[str, Verdicts] = {
    "name": Verdicts(TEXT.accepted, ["a/b", "..", "x" * 201]),
    "output_dir": Verdicts(TEXT.accepted, ["x" * 256]),
    "seed": whole("0 1 4294967295", "4294967296"),
    "init_from": Verdicts(TEXT_OR_NULL.accepted, ["x" * 256]),
    "model.vocab_size": whole("257 2147483647", "256 2147483648"),
    "model.expert_permutation": whole(f"0 1 {LARGEST}", or_null=True),
    "model.shared_expert_row": SWITCH,
    "model.expert_ids": choice("all seen", "none"),
    "model.hidden_size": whole("8 1048576", "7 9 2097152"),
    "model.num_layers": whole("1 4096", "4097"),
    "model.num_heads": whole("1 128", "3 256"),
    "model.num_kv_heads": whole("1 2 4", "3 8", or_null=True),
    "model.head_dim": whole("2 64 1048576", "3 1048577", or_null=True),
    "model.activation": choice("gelu swiglu", "relu"),
    "model.intermediate_size": whole("0 1 1048576", "1048577"),
    "model.num_experts": whole("0 1 1048576", "1048577"),
    "model.expert_layers": Verdicts(
        {"null": None, "auto": [0, 2], "0": [0], "1": [1], "[1, 2]": [1, 2], "[0, 1, 2, 3]": None},
        ["[]", "4", "-1", "[2, 0]", "[0, 0]", "0,2", "[auto, 1]", "[[1]]", "0.5", "Auto"],
    ),
    "model.null_expert": SWITCH,
    "model.expert_intermediate_size": whole("1 1048576", "1048577"),
    "model.expert_input": choice("embedding hidden", "Hidden"),
    "model.top_k": whole("1 4", "5", or_null=True),
    "model.max_sequence_length": whole("256 2147483647", "255 2147483648"),
    "model.rope_theta": number(f"1 1.5 1e38 {LARGEST} {HUGE}"),
    "model.rope_scaling": Verdicts({"null": None}, ["llama3", "8", "[]", "{type: linear}"]),
    "model.rope_scaling.factor": number(f"1 1.5 {LARGEST} {HUGE}", "0.5"),
    "model.rope_scaling.low_freq_factor": number("1 1.5 1e-30", "4"),
    "model.rope_scaling.high_freq_factor": number(f"1.5 {LARGEST} {HUGE}", "1"),
    "model.rope_scaling.original_max_position_embeddings": whole("1 2147483647", "2147483648"),
    "model.attention_bias": SWITCH,
    "model.qk_norm": SWITCH,
    "model.tie_embeddings": SWITCH,
    "model.norm_eps": number(f"1 1.5 1e-30 {LARGEST} {HUGE}"),
    "model.init_std": NOT_NEGATIVE,
    "model.scale_output_init": SWITCH,
    "model.expert_execution": choice("unique per_token unique_per_step"),
    "model.gradient_checkpointing": SWITCH,
    "data.files": LIST,
    "data.sources": Verdicts({"[]": []}, ["{}", "[{}]"]),
    "data.tokenizer.path": Verdicts(TEXT_OR_NULL.accepted, ["x" * 256]),
    "data.tokenizer.hub": TEXT_OR_NULL,
    "data.tokenizer.separator": Verdicts(
        {text: TEXT_OR_NULL.accepted[text] for text in TEXTS if text not in ("0", "1")}
    ),
    "data.tokenizer.vocab_size": whole("257 4096", "256 4097"),
    "data.tokenizer.training_mb": COUNT,
    "data.sequence_length": whole("1 512", "513"),
    "data.global_batch_size": COUNT,
    "data.micro_batch_size": COUNT,
    "data.document_mask": SWITCH,
    "data.validation_fraction": number("1e-30 0.999"),
    "data.validation_windows": COUNT,
    "data.seed": whole(f"0 1 {LARGEST}"),
    "data.shuffle_seed": whole(f"0 1 {LARGEST}", or_null=True),
    "data.max_malformed_fraction": number("0 1 0.5"),
    "data.max_empty_fraction": number("0 1 0.5"),
    "data.duplicate_memory_mb": COUNT,
    "data.prepare_processes": whole("1 4096", "4097", or_null=True),
    "data.shard_mb": COUNT,
    "data.num_workers": whole("0 1 4096", "4097"),
    "data.cache_dir": Verdicts(TEXT.accepted, ["x" * 256]),
    "objective.load_balance_weight": NOT_NEGATIVE,
    "objective.z_loss_weight": NOT_NEGATIVE,
    "optimizer.learning_rate": number(f"1 1.5 1e-30 {LARGEST} {HUGE}"),
    "optimizer.schedule": choice("cosine constant wsd"),
    "optimizer.min_learning_rate_ratio": number("0 1 0.5"),
    "optimizer.warmup_steps": whole(f"0 1 {LARGEST}"),
    "optimizer.decay_steps": whole("", or_null=True),
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.backbone_multipliers.learning_rate": NOT_NEGATIVE,
    "optimizer.backbone_multipliers.weight_decay": NOT_NEGATIVE,
    "optimizer.embedding_multipliers.learning_rate": NOT_NEGATIVE,
    "optimizer.embedding_multipliers.weight_decay": NOT_NEGATIVE,
    "optimizer.expert_multipliers.learning_rate": NOT_NEGATIVE,
    "optimizer.expert_multipliers.weight_decay": NOT_NEGATIVE,
    "optimizer.beta1": number("0 0.5"),
    "optimizer.beta2": number("0 0.5"),
    "optimizer.epsilon": NOT_NEGATIVE,
    "optimizer.gradient_clip_norm": NOT_NEGATIVE,
    "trainer.max_steps": COUNT,
    "trainer.max_time": choice("1:00:00:00 00:00:00:01", "1:00:00 60", or_null=True),
    "trainer.accelerator": choice("auto cpu gpu cuda", "tpu"),
    "trainer.devices": choice("auto 1 -1 2 0,1", "[] [0] -2 0 , 1. two"),
    "trainer.num_nodes": whole("1 2 16", "65537"),
    "trainer.strategy": choice("auto ddp ddp_fork fsdp2", "ddp_spawn fsdp"),
    "trainer.shard_devices": whole("", or_null=True),  # the strategy of the quick start shards nothing
    "trainer.precision": choice("auto 32-true bf16-mixed bf16-true 64-true", "32 16-mixed"),
    "trainer.val_check_interval": COUNT,
    "trainer.limit_val_batches": whole(f"0 1 {LARGEST}", or_null=True),
    "trainer.num_sanity_val_steps": whole(f"-1 0 1 {LARGEST}", "-2"),
    "trainer.log_every_n_steps": COUNT,
    "trainer.non_finite": choice("stop skip"),
    "trainer.compile": SWITCH,
    "trainer.deterministic": SWITCH,
    "trainer.fast_dev_run": SWITCH,
    "trainer.enable_progress_bar": SWITCH,
    "checkpoint.every_steps": COUNT_OR_NULL,
    "checkpoint.keep_last": COUNT,
    "checkpoint.keep_best": whole(f"0 1 {LARGEST}"),
    "checkpoint.sharded": Verdicts({"false": False, "no": False}, ["yes"]),
    "checkpoint.ema_decay": number("0.5 0.999", or_null=True),
    "checkpoint.final_weights": choice("last best"),
    "lut.at_fit_end": SWITCH,
    "lut.dtype": choice("float32 bfloat16 float16 int8 nf4 nf3", "int2"),
    "lut.chunk_tokens": COUNT_OR_NULL,
    "evaluation.at_fit_end": SWITCH,
    "evaluation.every_validations": COUNT_OR_NULL,
    "evaluation.tasks": Verdicts(
        {"[]": [], "next_passage": ["next_passage"]}, ["next_pasage", "[next_passage, next_pasage]"], LM_EVAL_WORDS
    ),
    "evaluation.num_fewshot": whole(f"0 1 {LARGEST}", or_null=True),
    "evaluation.task_limit": COUNT_OR_NULL,
    "evaluation.local_data": Verdicts(TEXT_OR_NULL.accepted, ["x" * 256]),
    "evaluation.corpora": Verdicts({"[]": []}, ["{}", "[{}]"]),
    "evaluation.batch_size": COUNT,
    "evaluation.dashboard": SWITCH,
    "evaluation.sample_prompt": Verdicts({**TEXT.accepted, "": ""}),
    "evaluation.sample_tokens": whole(f"0 1 {LARGEST}"),
    "evaluation.sample_temperature": NOT_NEGATIVE,
    "wandb.mode": choice("auto online offline disabled", "dryrun"),
    "wandb.project": Verdicts(
        {text: text for text in TEXTS if text not in ("null", "{a: 1}")} | {"null": None}, ["a/b", "x" * 129]
    ),
    "wandb.entity": TEXT_OR_NULL,
    "wandb.tags": Verdicts(LIST.accepted, ["x" * 65]),
    "wandb.log_table": SWITCH,
}
PLAIN = {text: text for text in TEXTS if text[0] not in "[{" and "," not in text}
PLAIN_OR_NULL = Verdicts({**PLAIN, "null": None})
FILES = Verdicts({**{text: [text] for text in PLAIN}, "[1, 2]": ["1", "2"]}, ["[]"])
ELEMENTS: dict[str, tuple[Mapping[str, str], dict[str, Verdicts]]] = {
    "data.sources": (
        {"files": "a.txt"},
        {
            "name": PLAIN_OR_NULL,
            "embedded": Verdicts({"false": False}, ["yes"]),
            "files": FILES,
            "hub": Verdicts({"null": None}),
            "subset": PLAIN_OR_NULL,
            "split": Verdicts(PLAIN),
            "revision": PLAIN_OR_NULL,
            "streaming": SWITCH,
            "text_field": Verdicts(PLAIN),
            "document_start": Verdicts(PLAIN_OR_NULL.accepted, ["(", "a**", "(?P<1>)"]),
            "weight": number(f"1 1.5 1e-30 {LARGEST} {HUGE}", or_null=True),
        },
    ),
    "evaluation.corpora": (
        {"name": "prose", "files": "a.txt"},
        {
            "name": Verdicts(PLAIN, ["held_out", "held_out/x"]),
            "files": FILES,
            "windows": COUNT,
        },
    ),
}
"""Keys of the elements of lists: what an element needs, and the verdicts of each of its keys."""


def schema(section: type, prefix: str = "") -> Iterator[tuple[str, type | None]]:
    """Yield the dotted keys of a config section, and what the elements of each are if they are sections."""
    hints = get_type_hints(section)
    for item in fields(section):
        key, hint = prefix + item.name, hints[item.name]
        if isinstance(hint, UnionType) and is_dataclass(kind := get_args(hint)[0]):
            yield key, None
            yield from schema(cast(type, kind), f"{key}.")
        elif is_dataclass(hint):
            assert isinstance(hint, type)
            yield from schema(hint, f"{key}.")
        else:
            yield key, next((inner for inner in get_args(hint) if is_dataclass(inner)), None)  # pyright: ignore


def test_every_key_has_verdicts() -> None:
    keys = dict(schema(RunConfig))
    hint = "write which values the key takes in KEYS of this file, and which it refuses"
    assert set(keys) == set(KEYS), hint
    elements = {key: {item.name for item in fields(kind)} for key, kind in keys.items() if kind is not None}
    assert elements == {key: set(verdicts) for key, (_, verdicts) in ELEMENTS.items()}, hint


def value_at(values: object, *names: str | int) -> object:
    for name in names:
        assert isinstance(values, dict | list)
        values = values[name]  # pyright: ignore
    return values


def refused_overrides(key: str) -> list[str]:
    """Return the overrides of a key, or of the keys of its elements, that are refused."""
    inside = [override for override, _, verdict in element_cases(key) if verdict is REFUSED] if key in ELEMENTS else []
    return [*(f"{key}={value}" for value in KEYS[key].all_refused), *inside]


def element_cases(key: str) -> Iterator[tuple[str, str, object]]:
    """Yield overrides of a list with one element, the key of it that is tried, and what that becomes."""
    needed, keys = ELEMENTS[key]
    for name, verdicts in keys.items():
        for value, verdict in verdicts.of_all().items():
            if value.isprintable() and not value.endswith(","):  # in a list, a value is YAML
                items = ", ".join(f"{each}: {text}" for each, text in {**needed, name: value}.items())
                yield f"{key}=[{{{items}}}]", name, verdict


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("key", KEYS)
def test_a_key_refuses_in_one_line_before_any_work(key: str, run_in_process: RunVerb) -> None:
    for override in refused_overrides(key):
        require_refused(run_in_process(train.main, *CONFIG, "--dry-run", override), key, override)


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("key", KEYS)
def test_every_verb_with_a_config_refuses_the_same(key: str, run_in_process: RunVerb) -> None:
    for override in refused_overrides(key):
        for main, stop in ((train.main, ["--print-config"]), (train.main, []), (prepare_data.main, [])):
            require_refused(run_in_process(main, *CONFIG, *stop, override), key, override)


def keeps(run: RunVerb, override: str) -> object:
    found = run(train.main, *CONFIG, "--print-config", override)
    assert (found.code, found.errors) == (0, []), (override, found)
    return yaml.safe_load(found.output)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("key", KEYS)
def test_a_key_keeps_an_accepted_value(key: str, run_in_process: RunVerb) -> None:
    value, expected = list(KEYS[key].accepted.items())[-1]
    assert value_at(keeps(run_in_process, f"{key}={value}"), *key.split(".")) == expected


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("key", KEYS)
def test_a_key_keeps_every_accepted_value(key: str, run_in_process: RunVerb) -> None:
    for value, expected in KEYS[key].accepted.items():
        assert value_at(keeps(run_in_process, f"{key}={value}"), *key.split(".")) == expected
        if value != "4096":  # as many layers take a minute to count
            found = run_in_process(train.main, *CONFIG, "--dry-run", f"{key}={value}")
            assert (found.code, found.errors) == (0, []), (value, found)


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("key", ELEMENTS)
def test_a_key_of_an_element_keeps_every_accepted_value(key: str, run_in_process: RunVerb) -> None:
    for override, name, expected in element_cases(key):
        if expected is not REFUSED:
            assert value_at(keeps(run_in_process, override), *key.split("."), 0, name) == expected, override


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["seed"], "'seed'"),
        (["=1"], "'=1'"),
        ([""], "''"),
        (["."], "'.'"),
        (["+seed=1"], "'+seed'"),
        (["~seed"], "'~seed'"),
        (["seed==1"], "seed: '=1'"),
        (["seed.x=1"], "seed: keys with values"),
        (["seed..x=1"], "seed: keys with values"),
        (["trainer.=1"], "'trainer.'"),
        ([".seed=1"], "''"),
        (["trainer..max_steps=1"], "'trainer.'"),
        (["trainer.steps.max=1"], "'trainer.steps'"),
        (["trainer=1"], "trainer: found '1'"),
        (["trainer={}", "trainer.max_steps=x"], "trainer.max_steps: 'x'"),
        (["data.files.0=a.txt"], "data.files[0]: keys with values"),
        (["data.files[0]=a.txt"], "'data.files[0]'"),
        (["model.hidden_size.unit=1"], "model.hidden_size: keys with values"),
        (["no\nsuch=1"], r"'no\nsuch'"),
        (["lut.dtype=nf3", "model.hidden_size=64"], "lut.dtype: nf3 packs values by 128, but model.hidden_size is 64"),
        (["evaluation.corpora=[{name: a, files: b}, {name: a, files: c}]"], "evaluation.corpora: a is another corpus"),
        (["--seed=1"], "--seed=1"),
    ],
)
def test_what_is_no_override_of_a_key_is_named(overrides: list[str], named: str, run_in_process: RunVerb) -> None:
    for main, stop in ((train.main, ["--dry-run"]), (prepare_data.main, [])):
        require_refused(run_in_process(main, *CONFIG, *stop, *overrides), named, str(overrides))


def test_the_last_of_two_overrides_of_a_key_counts(run_in_process: RunVerb) -> None:
    found = run_in_process(train.main, *CONFIG, "--print-config", "seed=1", " seed = 2", "trainer={max_steps: 7}")
    values = yaml.safe_load(found.output)
    assert (value_at(values, "seed"), value_at(values, "trainer", "max_steps")) == (2, 7)
    assert value_at(values, "trainer", "val_check_interval") == 130  # the section's other keys stay


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trainer.devices=-1", "trainer.devices: '-1' selects CUDA devices"),
        ("trainer.devices=0,1", "trainer.devices: '0,1' selects CUDA devices"),
        ("init_from=no-run", "init_from: no-run: no such run directory"),
        ("evaluation.corpora=[{name: a, files: no-file}]", "evaluation.corpora: 'no-file' matches no file"),
        ("data.tokenizer.path=no.json", "data.tokenizer.path: no.json: no such tokenizer file"),
        ("data.files=no-file", "data.files: 'no-file' matches no file"),
        ("data.sources=[{files: no-file}]", "data.sources: 'no-file' matches no file"),
    ],
)
def test_what_a_run_would_read_is_looked_for_before_any_work(
    override: str, named: str, run_in_process: RunVerb
) -> None:
    found = run_in_process(train.main, *CONFIG, "wandb.mode=disabled", "trainer.accelerator=cpu", override)
    assert (found.code, found.output) == (2, "")
    assert found.errors[-1].startswith(f"error: {named}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("accelerator", ["cuda", "gpu"])
def test_an_accelerator_that_is_not_there_is_named_before_any_work(accelerator: str, run_in_process: RunVerb) -> None:
    found = run_in_process(train.main, *CONFIG, "wandb.mode=disabled", f"trainer.accelerator={accelerator}")
    require_refused(found, f"trainer.accelerator: {accelerator}, but this machine has no usable CUDA", accelerator)


BY_CORPUS = ("data.files", "data.tokenizer.path", "data.tokenizer.separator", "data.validation_fraction")
"""Keys of which an accepted value may name or want what a small corpus does not have."""


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in KEYS if key.startswith("data.") and key != "data.tokenizer.hub"])
def test_a_corpus_is_prepared_with_every_accepted_value(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_in_process: RunVerb
) -> None:
    monkeypatch.chdir(tmp_path)
    for part in range(20):
        Path(f"{part}.txt").write_text(f"def f{part}(a, b):\n    return a + {part} * b\n" * 20)
    small = ["data.files=*.txt", "data.tokenizer.vocab_size=300", "data.sequence_length=8", "data.prepare_processes=1"]
    for value in KEYS[key].accepted:
        if not value.isprintable() or value == "4096":  # as many processes
            continue
        found = run_in_process(prepare_data.main, *CONFIG, *small, f"{key}={value}")
        if key in BY_CORPUS and found.code:
            assert (found.code, found.output) == (2, ""), (value, found)
            assert key in found.errors[-1], (value, found)
        else:
            assert found.code == 0, (value, found)
