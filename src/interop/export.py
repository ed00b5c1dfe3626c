"""Runs as folders of transformers: without code where it has the model, else with ours; whole or not at all.

A Dense run whose block is that of a family in `blocks.py` becomes a plain folder, with the files that it came with as
they were. Every other run becomes the folder of `remote_folder.py`. Nothing here imports transformers.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from src.data.text_rule import TextRule
from src.data.tokenizer import fingerprint, load_run_rule, load_tokenizer
from src.errors import CheckpointError, LutMismatchError
from src.inference import load_model
from src.inference.loader import as_run
from src.interop.blocks import BlockFamily
from src.interop.families import Family, register_family
from src.interop.huggingface import BLOCK_FAMILIES, KEPT, import_huggingface
from src.interop.model_card import model_card, plug_in_card
from src.interop.official import require_new
from src.interop.reader import read_json
from src.interop.remote_folder import (
    TABLE,
    as_json,
    copy_table,
    generation_values,
    plug_in_config,
    readable_table,
    remote_texts,
    special_ids,
    tokenizer_texts,
)
from src.model import ModelConfig
from src.run_directory import RunDirectory, read_tensors, write_tensors
from src.system.console import Progress, no_progress
from src.system.files import atomic_directory, atomic_path, copy_file, write_text

WEIGHTS = "model.safetensors"
OF_TOKENIZERS = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "additional_chat")
"""How the names of a tokenizer's files begin."""
REPLACED = ("rope_parameters", "rope_scaling", "rope_theta", "torch_dtype")
"""Keys of config.json that are left out where others say the same."""


def export_huggingface(
    run_dir: Path | str | RunDirectory,
    checkpoint_dir: Path | str,
    *,
    lut: str = TABLE,
    progress: Progress = no_progress,
) -> None:
    """Write a run as a new folder for `AutoModelForCausalLM.from_pretrained`.

    A MoLE is written in its lookup form, with the table named `lut`: as hard links, where the disk has them. A plug-in
    is written together with its base.

    Raises:
        CheckpointError: `checkpoint_dir` exists, or the exported code does not know the table's precision.
        RunError: the run is incomplete.
        LutError: there is no such table, it is damaged, or it belongs to another model.
    """
    run, target = as_run(run_dir).require(), Path(checkpoint_dir)
    require_new(target)
    config, rule = run.model_config(), _rule(run)
    table = readable_table(run, lut) if config.architecture == "mole" else None
    with load_model(run, experts="lut" if table else "ffn", lut=lut) as model:  # refuses what does not fit
        dtype, parameters = model.embedding.weight.dtype, sum(weight.numel() for weight in model.parameters())
    family = _family(run, config)
    card = model_card(target.name, config, parameters, run.record(), table, lut, remote_code=family is None)
    texts = {"README.md": card, "generation_config.json": as_json(generation_values(config, rule))}
    texts |= {} if rule is None else tokenizer_texts(config, rule)
    if family is None:
        texts |= remote_texts(config, dtype, table, rule)
    else:
        texts["config.json"] = _config_text(run, family, config, dtype, rule)
    rows, base = [] if table is None else [run.lut_path(lut) / name for name in table.file_names], run.base()
    size = sum(path.stat().st_size for path in (run.backbone_path, *rows))
    with atomic_directory(target) as directory, progress("writing the folder (bytes)", size) as advance:
        for name, text in texts.items():
            write_text(directory / name, text)
        _return_kept(base or run, rule, directory)
        if family is None:
            copy_table(rows, directory, advance)
            if base is None:  # no link: saving a model changes its file in place
                copy_file(run.backbone_path, directory / WEIGHTS, advance)
            else:
                write_tensors(directory / WEIGHTS, run.backbone_weights(), {"format": "pt"})
        else:
            _write_renamed(read_tensors(run.backbone_path), family, config, directory / WEIGHTS)
            advance(size)


def export_plug_in(
    run_dir: Path | str | RunDirectory,
    checkpoint_dir: Path | str,
    *,
    lut: str = TABLE,
    progress: Progress = no_progress,
) -> None:
    """Write a plug-in as a new folder without its base, which `convert --from hf` makes a plug-in again.

    Raises:
        CheckpointError: `checkpoint_dir` exists, or the run is no plug-in.
        LutError: there is no such table, or it belongs to another model.
    """
    run, target = as_run(run_dir).require(), Path(checkpoint_dir)
    require_new(target)
    if (plug_in := run.plug_in()) is None:
        raise CheckpointError(f"{run.path}: holds all of its weights, so it is no plug-in; leave --plug-in-only out")
    table = readable_table(run, lut)
    if table.backbone != run.identity().backbone:
        raise LutMismatchError(f"{run.lut_path(lut)}: belongs to other weights than {run.backbone_path}; rebuild it")
    config, rule = run.model_config(), _rule(run)
    texts = {"README.md": plug_in_card(target.name, plug_in, table)}
    texts |= {} if rule is None else tokenizer_texts(config, rule)
    texts["config.json"] = plug_in_config(config, plug_in, table, rule)
    rows = [run.lut_path(lut) / name for name in table.file_names]
    size = sum(path.stat().st_size for path in (run.backbone_path, *rows))
    with atomic_directory(target) as directory, progress("writing the folder (bytes)", size) as advance:
        for name, text in texts.items():
            write_text(directory / name, text)
        copy_file(run.backbone_path, directory / WEIGHTS, advance)
        copy_table(rows, directory, advance)


def _rule(run: RunDirectory) -> TextRule | None:
    if not run.tokenizer_path.is_file():
        return None
    return load_run_rule(run.tokenizer_path, run.recorded_tokenizers(), run.text_rule())


def _family(run: RunDirectory, config: ModelConfig) -> BlockFamily | None:
    """Return the family that a run came from, or the first one that has its block; None where none has."""
    kept = run.path / KEPT / "config.json"
    came_from = read_json(kept).get("model_type") if kept.is_file() else None
    families = sorted(BLOCK_FAMILIES.values(), key=lambda family: family.model_type != came_from)
    return next((family for family in families if family.write_config(config) is not None), None)


def _config_text(
    run: RunDirectory, family: BlockFamily, config: ModelConfig, dtype: torch.dtype, rule: TextRule | None
) -> str:
    """Return config.json: the one that came with the run, where it still says what the model is."""
    written, path, precision = family.write_config(config), run.path / KEPT / "config.json", _name(dtype)
    assert written is not None
    kept = read_json(path) if path.is_file() else {}
    if kept.get("model_type") == family.model_type:
        same = family.write_config(family.read_config(kept, str(path))) == written
        if same and precision == kept.get("dtype", kept.get("torch_dtype")):
            return path.read_text(encoding="utf-8")
    else:
        kept = special_ids(rule)
    others = {key: value for key, value in kept.items() if key not in REPLACED}
    return as_json({**others, **written, "dtype": precision})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _return_kept(run: RunDirectory, rule: TextRule | None, directory: Path) -> None:
    """Copy the files that came with a run over ours, but those of another tokenizer than the run's."""
    kept = run.path / KEPT
    path, same = kept / "tokenizer.json", False
    if rule is not None and path.is_file():
        same = fingerprint(load_tokenizer(path)) == fingerprint(rule.tokenizer)
    for source in sorted(kept.rglob("*")):
        name = source.relative_to(kept)
        if source.is_file() and name.name != "config.json" and (same or not str(name).startswith(OF_TOKENIZERS)):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, directory / name)


def _write_renamed(weights: Mapping[str, Tensor], family: BlockFamily, config: ModelConfig, path: Path) -> None:
    renamed = {
        name: part.contiguous()
        for entry in family.correspondences(config)
        for name, part in zip(entry.theirs, entry.split(weights[entry.ours]), strict=True)
    }
    with atomic_path(path) as temporary:
        save_file(renamed, temporary, metadata={"format": "pt"})


register_family(
    Family(
        name="hf",
        help="folders of transformers: Llama, Mistral, Qwen2, Qwen3 and SmolLM, which is a Llama; any run, as one",
        import_checkpoint=import_huggingface,
        export_checkpoint=export_huggingface,
        export_plug_in=export_plug_in,
    )
)
