"""Folders that transformers opens with our code: what is in them, and their way back into a run.

A folder holds the code of `remote_code/`, the backbone under the names that it has in a run, and the table as it is.
Nothing here imports transformers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor

from src.data.text_rule import TextRule, recorded_rule, template
from src.data.tokenizer import load_tokenizer, num_ids, require_room
from src.errors import CheckpointError, ConfigError, LutMismatchError
from src.interop.huggingface import MODEL_TYPES
from src.interop.official import require_new, require_shapes, run_config_values
from src.interop.reader import CheckpointTensors, read_json
from src.lut.manifest import Manifest, read_manifest
from src.lut.scan import check_shard
from src.model import ModelConfig, Transformer
from src.run_directory import PLUG_IN, PlugIn, RunDirectory, added_weights, hash_weights, identify, read_plug_in
from src.system.console import Advance, Progress, no_progress
from src.system.files import atomic_directory, link_or_copy, write_text

MODEL_TYPE, TABLE = "mole", "lut"
CODE = Path(__file__).parent / "remote_code"
PRECISIONS = ("float32", "bfloat16", "float16", "int8", "nf4", "nf3")
"""Of tables that the remote code reads."""
KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_sequence_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "top_k": "num_experts_per_tok",
    "num_kv_heads": "num_key_value_heads",
    "activation": "hidden_act",
    "tie_embeddings": "tie_word_embeddings",
    "rope_scaling": "llama3_rope_scaling",
}
"""Keys of `ModelConfig` under the names that transformers has for them; others keep theirs."""
OF_TRAINING = ("expert_execution", "gradient_checkpointing")
"""Keys of `ModelConfig` that say how to compute, not what."""


def import_exported(
    checkpoint_dir: Path | str,
    run_dir: Path | str,
    *,
    top_k: int = 2,
    tokenizer: Path | None = None,
    progress: Progress = no_progress,
) -> None:
    """Read a folder that was exported with code, or transformers saved since, into a new run directory.

    `tokenizer` replaces the folder's own; `top_k` is not needed, as config.json has it.

    Raises:
        CheckpointError: the folder is not complete, or `run_dir` exists.
        DataError: the tokenizer cannot be read, or has more ids than the model.
        LutError: the table is damaged, or belongs to other weights.
    """
    del top_k
    source, target = Path(checkpoint_dir), Path(run_dir)
    require_new(target)
    values, where = read_json(source / "config.json"), str(source / "config.json")
    config, checkpoint = _model_config(values, where), CheckpointTensors(source)
    plug_in = read_plug_in(values, where)
    with torch.device("meta"):
        expected: Mapping[str, Tensor] = Transformer(config, with_experts=False).state_dict()
    expected = expected if plug_in is None else added_weights(expected)
    require_shapes(checkpoint.shapes, {name: tuple(weight.shape) for name, weight in expected.items()}, source)
    weights = {name: checkpoint.tensor(name) for name in expected}
    backbone = hash_weights(weights.items()) if plug_in is None else str(values.get("backbone"))
    table = _table_of(source / TABLE, backbone) if config.architecture == "mole" else None
    rule = _imported_rule(values, source, tokenizer)
    rows = [] if table is None else [source / TABLE / name for name in table.file_names]
    with (
        atomic_directory(target) as directory,
        progress("reading the folder (bytes)", sum(path.stat().st_size for path in rows)) as advance,
    ):
        run = RunDirectory(directory)
        run.write_config(run_config_values(config, target, rule), None if rule is None else rule.record(), plug_in)
        if rule is not None:
            require_room(rule.tokenizer, config.vocab_size)
            write_text(run.tokenizer_path, rule.tokenizer.to_str(pretty=True))
        identity = replace(identify(weights, {}), backbone=backbone)
        if table is not None and table.training_form is not None:  # the experts are in the table alone
            identity = replace(identity, training_form=table.training_form)
        run.write_backbone(weights, identity)
        copy_table(rows, run.path, advance)


def _model_config(values: Mapping[str, object], where: str) -> ModelConfig:
    if values.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{where}: model_type is {values.get('model_type')!r}, but only {MODEL_TYPE!r} is known")
    names = {field.name: KEYS.get(field.name, field.name) for field in fields(ModelConfig)}
    found = {ours: values[theirs] for ours, theirs in names.items() if theirs in values}
    try:
        config = ModelConfig.from_dict(found, where)
        if config.kv_heads == config.num_heads:
            config = replace(config, num_kv_heads=None)
        if config.attention_head_dim * config.num_heads == config.hidden_size:
            config = replace(config, head_dim=None)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error
    return config


def _table_of(lut_dir: Path, backbone: str) -> Manifest:
    table = read_manifest(lut_dir)
    for shard in table.shards:
        check_shard(lut_dir, shard, table.layout)
    if table.backbone != backbone:
        raise LutMismatchError(
            f"{lut_dir}: belongs to backbone {table.backbone}, but the weights are {backbone}; they were changed since "
            "they were exported, so train on in the run that they came from"
        )
    return table


def _imported_rule(values: Mapping[str, object], source: Path, given: Path | None) -> TextRule | None:
    """Return the rule that `_recorded` wrote, with the tokenizer as it was in the run."""
    path, record = given or source / "tokenizer.json", values.get("text_rule")
    if not path.is_file() or not isinstance(record, Mapping):
        return None
    rule = dict(record)
    tokenizer = json.loads(load_tokenizer(path).to_str())
    if given is None:
        tokenizer["post_processor"] = rule.get("post_processor")
    return recorded_rule(Tokenizer.from_str(json.dumps(tokenizer)), str(source), rule)


def readable_table(run: RunDirectory, lut: str) -> Manifest:
    """Return the manifest of a table; CheckpointError where the code does not know its precision."""
    table = read_manifest(run.lut_path(lut))
    if table.layout.precision not in PRECISIONS:
        raise CheckpointError(
            f"{run.lut_path(lut)}: holds rows in {table.layout.precision}, but the exported code reads "
            f"{', '.join(PRECISIONS)}; write such a table with `python -m src.reparameterize --from-lut`"
        )
    return table


def copy_table(files: Sequence[Path], directory: Path, advance: Advance) -> None:
    """Put the files of a table, if there are any, into a folder inside a run's or an export's directory."""
    for path in files:
        (directory / TABLE).mkdir(exist_ok=True)
        link_or_copy(path, directory / TABLE / path.name, advance)


def remote_texts(
    config: ModelConfig, dtype: torch.dtype, table: Manifest | None, rule: TextRule | None
) -> dict[str, str]:
    """Return config.json and the code, by file name."""
    code = {path.name: path.read_text(encoding="utf-8") for path in sorted(CODE.glob("*.py"))}
    return {"config.json": as_json(_config_values(config, dtype, table, rule)), **code}


def _config_values(
    config: ModelConfig, dtype: torch.dtype, table: Manifest | None, rule: TextRule | None
) -> dict[str, object]:
    """Return config.json, from which `import_exported` reads the run's settings again."""
    model = {KEYS.get(key, key): value for key, value in config.to_dict().items() if key not in OF_TRAINING}
    return {
        "architectures": ["MoleForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mole.MoleConfig",
            "AutoModelForCausalLM": "modeling_mole.MoleForCausalLM",
        },
        "model_type": MODEL_TYPE,
        "dtype": str(dtype).removeprefix("torch."),
        **model,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.attention_head_dim,
        "backbone": None if table is None else table.backbone,
        "text_rule": None if rule is None else _recorded(rule),
        **special_ids(rule),
    }


def plug_in_config(config: ModelConfig, plug_in: PlugIn, table: Manifest, rule: TextRule | None) -> str:
    """Return config.json of a plug-in without its base: it names the base, and no code, as none could load it alone."""
    values = _config_values(config, torch.float32, table, rule)
    left_out = ("architectures", "auto_map", "dtype")
    record = {**asdict(plug_in), "base": Path(plug_in.base).name}
    return as_json({PLUG_IN: record, **{key: value for key, value in values.items() if key not in left_out}})


def _recorded(rule: TextRule) -> dict[str, Any]:
    """Return a run's text rule, and what tokenizer.json loses: the template, where the run does not follow it."""
    processor = json.loads(rule.tokenizer.to_str())["post_processor"]
    return {**rule.record(), "post_processor": processor}


def special_ids(rule: TextRule | None) -> dict[str, object]:
    """Return the ids that stand around texts, as config.json and generation_config.json name them."""
    if rule is None:
        return {}
    start = rule.before[-1] if rule.before else rule.separator  # what lm-eval puts in front of a text without context
    ends = list(rule.stop_ids) if rule.stops else rule.separator
    return {"bos_token_id": start, "eos_token_id": ends, "pad_token_id": rule.separator}


def generation_values(config: ModelConfig, rule: TextRule | None) -> dict[str, object]:
    """Return generation_config.json: greedy, and no id that the tokenizer cannot decode."""
    known = config.vocab_size if rule is None else num_ids(rule.tokenizer)
    unknown = {"suppress_tokens": list(range(known, config.vocab_size))} if known < config.vocab_size else {}
    return {**special_ids(rule), "do_sample": False, **unknown}


def tokenizer_texts(config: ModelConfig, rule: TextRule) -> dict[str, str]:
    """Return tokenizer.json and tokenizer_config.json, by which transformers makes the ids that the run does."""
    values = as_json(_tokenizer_values(config, rule))
    return {"tokenizer.json": _tokenizer(rule), "tokenizer_config.json": values}


def _tokenizer_values(config: ModelConfig, rule: TextRule) -> dict[str, object]:
    start = rule.before[-1] if rule.before else rule.separator
    ids = {"bos_token": start, "eos_token": rule.separator, "pad_token": rule.separator}
    names = {key: rule.tokenizer.id_to_token(token_id) for key, token_id in ids.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": config.max_sequence_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # text is text
    }


def _tokenizer(rule: TextRule) -> str:
    """Return a tokenizer.json that puts in front of a text what the run does, and nothing behind it."""
    tokenizer = Tokenizer.from_str(rule.tokenizer.to_str())
    if template(tokenizer) != (rule.before, ()):
        tokens = [(rule.tokenizer.id_to_token(token_id), token_id) for token_id in rule.before]
        single = [*(str(token) for token, _ in tokens), "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, "$B:1"], special_tokens=tokens
        )
    return tokenizer.to_str(pretty=True)


def as_json(values: Mapping[str, object]) -> str:
    """Return the text of a JSON file."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


MODEL_TYPES[MODEL_TYPE] = import_exported
