"""Writes a run directory as a checkpoint for the authors' code, whole or not at all.

A run without a training form is written re-parameterised, its table as `moe_table`, streamed: memory never holds it.
"""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from src.data.tokenizer import END_OF_TEXT, load_tokenizer
from src.errors import CheckpointError
from src.inference import InferenceModel, load_model
from src.inference.disk_experts import DiskExperts
from src.interop.importer import require_new
from src.interop.names import TABLE_NAME, official_config, require_expressible, to_official
from src.interop.table import Progress, export_table, no_progress
from src.lut.manifest import MANIFEST_NAME
from src.run_directory import RunDirectory
from src.system.files import atomic_directory, atomic_path, write_text


def export_official(
    run_dir: Path | str, checkpoint_dir: Path | str, *, lut: str = "lut", progress: Progress = no_progress
) -> None:
    """Write a run as a Hugging Face directory that the authors' code loads.

    Args:
        run_dir: its training form is written; without one, its backbone and its table.
        checkpoint_dir: must not exist yet.
        lut: name of the table inside the run, where that is what is written.
        progress: shows the table being written.

    Raises:
        CheckpointError: the authors' code has no such model, or `checkpoint_dir` exists.
        RunError: the run is incomplete.
        LutError: the table is damaged or belongs to another model.
    """
    run, target = RunDirectory(Path(run_dir)).require(), Path(checkpoint_dir)
    require_new(target)
    require_expressible(run.model_config())
    with_table = _is_table_only(run, lut)
    with (
        load_model(run.path, experts="lut" if with_table else "ffn", lut=lut) as model,
        atomic_directory(target) as directory,
    ):
        _write_weights(model, directory, progress)
        end_of_text = None
        if run.tokenizer_path.is_file():
            tokenizer = load_tokenizer(run.tokenizer_path)
            end_of_text = tokenizer.token_to_id(END_OF_TEXT)
            write_text(directory / "tokenizer.json", tokenizer.to_str(pretty=True))
        config = official_config(model.config, model.head.weight.dtype, end_of_text)
        write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")


def _is_table_only(run: RunDirectory, lut: str) -> bool:
    if run.model_config().architecture != "mole" or run.experts_path.is_file():
        return False
    if not (run.lut_path(lut) / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"{run.path}: holds neither {run.experts_path.name} nor a finished table {lut}; nothing to export"
        )
    return True


def _write_weights(model: InferenceModel, directory: Path, progress: Progress) -> None:
    weights = to_official(model.state_dict(), model.config)
    dtype = model.head.weight.dtype  # that of the run, whose routers were widened for inference
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
    if not isinstance(model.experts, DiskExperts):
        _save(weights, directory / "model.safetensors")
        return
    backbone, table = (f"model-0000{part}-of-00002.safetensors" for part in (1, 2))
    _save(weights, directory / backbone)
    table_bytes = export_table(model.experts.store, directory / table, progress)
    total = sum(tensor.nbytes for tensor in weights.values()) + table_bytes
    index = {"metadata": {"total_size": total}, "weight_map": {**dict.fromkeys(weights, backbone), TABLE_NAME: table}}
    write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _save(weights: dict[str, Tensor], path: Path) -> None:
    with atomic_path(path) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
