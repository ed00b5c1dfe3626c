"""The authors' Hugging Face checkpoints (JieShibo/MoLE) as run directories, and back; whole or not at all.

A re-parameterized checkpoint becomes a run with a table and no `experts.safetensors`. Its training form is unknown;
the identity that stands for it covers the backbone and no experts, so that comparing and recomputing both work.
A run without a training form is written re-parameterized, its table streamed as `moe_table`: memory never holds it.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from src.data.config import DataConfig
from src.data.text_rule import TextRule, imported_rule
from src.data.tokenizer import fingerprint, load_run_rule, load_tokenizer, vocabulary_size
from src.errors import CheckpointError, DataError
from src.inference import InferenceModel, load_model
from src.inference.disk_experts import DiskExperts
from src.inference.loader import as_run
from src.interop.families import Family, register_family
from src.interop.names import (
    TABLE_NAME,
    Correspondence,
    correspondences,
    official_config,
    official_shapes,
    read_model_config,
    require_expressible,
    to_official,
)
from src.interop.reader import CheckpointTensors, read_json
from src.interop.table import OfficialRows, export_table, import_table
from src.lut.manifest import MANIFEST_NAME
from src.model import ModelConfig
from src.run_directory import RunDirectory
from src.system.console import Progress, no_progress
from src.system.files import atomic_directory, atomic_path, write_text

NAMES_SHOWN = 5


def import_official(
    checkpoint_dir: Path | str,
    run_dir: Path | str,
    *,
    top_k: int = 2,
    tokenizer: Path | str | None = None,
    progress: Progress = no_progress,
) -> None:
    """Read one of the authors' checkpoints (Dense, MoE, MoLE or MoLE re-parameterized) into a new run directory.

    A checkpoint holds config.json and safetensors (whole or in shards) or pytorch_model.bin. Its config does not say
    how many experts an MoE mixes per token: `top_k` does. `tokenizer` replaces the checkpoint's own.

    Raises:
        CheckpointError: the directory is not a complete checkpoint of theirs, or `run_dir` exists.
        DataError: the tokenizer cannot be read, has more ids than the model, or none that is known to end documents.
    """
    source, target = Path(checkpoint_dir), Path(run_dir)
    require_new(target)
    config_path = source / "config.json"
    values, checkpoint = read_json(config_path), CheckpointTensors(source)
    config = read_model_config(values, checkpoint.shapes, top_k, str(config_path))
    with_table = TABLE_NAME in checkpoint.shapes
    require_shapes(checkpoint.shapes, official_shapes(config, with_table=with_table), source)
    rule = _load_rule(tokenizer, source, config)
    with atomic_directory(target) as directory:
        run = RunDirectory(directory)
        run.write_config(run_config_values(config, target, rule), None if rule is None else rule.record())
        if rule is not None:
            write_text(run.tokenizer_path, rule.tokenizer.to_str(pretty=True))
        entries = correspondences(config, with_experts=not with_table)
        identity = run.write_weights(read_weights(checkpoint, entries, source))
        if with_table:
            known = None if rule is None else fingerprint(rule.tokenizer)
            import_table(OfficialRows(config, identity, checkpoint), run.lut_path(), known, source, progress)


def export_official(
    run_dir: Path | str | RunDirectory,
    checkpoint_dir: Path | str,
    *,
    lut: str = "lut",
    progress: Progress = no_progress,
) -> None:
    """Write a run as a new Hugging Face directory that the authors' code loads.

    Its training form is written; if it has none, its backbone and the table named `lut`.

    Raises:
        CheckpointError: the authors' code has no such model, or `checkpoint_dir` exists.
        RunError: the run is incomplete.
        LutError: the table is damaged or belongs to another model.
    """
    run, target = as_run(run_dir).require(), Path(checkpoint_dir)
    require_new(target)
    require_expressible(run.model_config())
    with_table = _is_table_only(run, lut)
    with (
        load_model(run, experts="lut" if with_table else "ffn", lut=lut) as model,
        atomic_directory(target) as directory,
    ):
        _write_weights(model, directory, progress)
        end_of_text = None
        if run.tokenizer_path.is_file():
            rule = load_run_rule(run.tokenizer_path, run.recorded_tokenizers(), run.text_rule())
            end_of_text = rule.separator
            write_text(directory / "tokenizer.json", rule.tokenizer.to_str(pretty=True))
        config = official_config(model.config, model.head.weight.dtype, end_of_text)
        write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")


def require_new(path: Path) -> None:
    """Raise CheckpointError if `path` exists."""
    if path.exists():
        raise CheckpointError(f"{path}: exists already; choose another --output, or remove it")


def read_weights(checkpoint: CheckpointTensors, entries: Iterable[Correspondence], where: Path) -> dict[str, Tensor]:
    """Return our tensors of `entries`; CheckpointError for parts of one tensor in different precisions."""
    weights: dict[str, Tensor] = {}
    for entry in entries:
        parts = [checkpoint.tensor(name) for name in entry.theirs]
        for name, part in zip(entry.theirs, parts, strict=True):
            if not part.is_floating_point():
                raise CheckpointError(f"{where}: {name} is {part.dtype}, but weights must be floating-point numbers")
            if part.dtype != parts[0].dtype:
                raise CheckpointError(
                    f"{where}: {name} is {part.dtype}, but {entry.theirs[0]} is {parts[0].dtype}; "
                    "save the checkpoint in one precision"
                )
        weights[entry.ours] = entry.join(parts)
    return weights


def require_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Raise CheckpointError naming missing, surplus and misshapen tensors, all three at once."""
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    misshapen = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{title} {_shorten(names)}"
        for title, names in (("missing:", missing), ("surplus:", surplus), ("misshapen:", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(f"{where}: its tensors are not those of its config.json; {'; '.join(problems)}")


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _load_rule(given: Path | str | None, source: Path, config: ModelConfig) -> TextRule | None:
    """Load the given tokenizer or the checkpoint's own; the model may have more ids, as padding."""
    path = Path(given) if given is not None else source / "tokenizer.json"
    if given is None and not path.is_file():
        return None
    tokenizer = load_tokenizer(path)
    if (size := vocabulary_size(tokenizer)) > config.vocab_size:
        raise DataError(
            f"{path}: has {size} ids, but the model's vocabulary has {config.vocab_size}; "
            "pass the tokenizer that the model was trained with"
        )
    return imported_rule(tokenizer, str(path))


def run_config_values(config: ModelConfig, run_dir: Path, rule: TextRule | None) -> dict[str, object]:
    """Return the keys that a run's config.yaml needs; all others keep their defaults."""
    return {
        "name": run_dir.name,
        "model": config.to_dict(),
        "data": {
            "sequence_length": min(DataConfig().sequence_length, config.max_sequence_length),
            "tokenizer": {
                "path": str(run_dir / "tokenizer.json"),
                "separator": None if rule is None else rule.record()["separator"],
            },
        },
        "trainer": {"max_steps": 1},
    }


def _is_table_only(run: RunDirectory, lut: str) -> bool:
    if run.model_config().architecture != "mole" or run.experts_path.is_file():
        return False
    if not (run.lut_path(lut) / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"{run.path}: holds neither {run.experts_path.name} nor a finished table {lut} (--lut); nothing to export"
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


register_family(
    Family(
        name="official",
        help="the code of the paper's authors (JieShibo/MoLE): Dense, MoE, MoLE, MoLE re-parameterized",
        import_checkpoint=import_official,
        export_checkpoint=export_official,
    )
)
