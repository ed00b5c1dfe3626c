"""The golden checkpoints, and other forms of them on disk."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import Tensor

from src.data.tokenizer import train_bpe
from src.interop.blocks import BlockFamily
from src.model import ModelConfig
from tests.model.models import build

GOLDEN = Path(__file__).parent.parent / "golden"
Writer = Callable[[Path, dict[str, Tensor]], None]
NAMES = ["dense", "moe_top2", "mole", "mole_rep"]


def golden_tensors(name: str) -> dict[str, Tensor]:
    """The authors' tensors of a golden model."""
    return load_file(GOLDEN / name / "model.safetensors")


def golden_numbers(name: str) -> dict[str, Tensor]:
    """What the authors' code computes from them."""
    return load_file(GOLDEN / name / "golden.safetensors")


def golden_config(name: str) -> dict[str, object]:
    """The golden model's config.json."""
    return json.loads((GOLDEN / name / "config.json").read_text(encoding="utf-8"))


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, object],
    write: Writer | None = None,
) -> Path:
    """Write a checkpoint directory; by default with one model.safetensors."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (write or write_single)(directory, dict(tensors))
    return directory


def write_single(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Write model.safetensors."""
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def write_sharded(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Write three shards and their index, as save_pretrained does for large models."""
    weight_map: dict[str, str] = {}
    names = sorted(tensors)
    for shard in range(3):
        file = f"model-0000{shard + 1}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[shard::3]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_pickle(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Write pytorch_model.bin."""
    torch.save(tensors, directory / "pytorch_model.bin")


def copy_golden(name: str, directory: Path) -> Path:
    """Copy a golden checkpoint, to be damaged."""
    shutil.copytree(GOLDEN / name, directory)
    return directory


def write_block_folder(directory: Path, config: ModelConfig, family: BlockFamily, dtype: torch.dtype) -> Path:
    """Write a folder of random weights as transformers does, with a tokenizer that puts <s> before a text."""
    values = {**(family.write_config(config) or {}), "eos_token_id": 0}
    weights = build(config, torch.float32).to(dtype).state_dict()
    tensors = {
        name: part.contiguous()
        for entry in family.correspondences(config)
        for name, part in zip(entry.theirs, entry.split(weights[entry.ours]), strict=True)
    }
    write_checkpoint(directory, tensors, values)
    tokenizer = train_bpe(iter(["def words(of, a, table): return [of, a, table]"] * 9), config.vocab_size - 1)
    tokenizer.add_special_tokens(["<s>"])
    token = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[token])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def read_checkpoint(directory: Path) -> dict[str, Tensor]:
    """Read every safetensors file of a directory."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found
