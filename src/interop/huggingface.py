"""Folders that transformers writes, as runs: found by their `model_type`, read tensor by tensor; whole or not at all.

A folder holds config.json, safetensors (whole or in shards) and tokenizer.json. Its texts, such as the chat template,
are kept in the run as they are, so that an export can return them. Nothing here imports transformers.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from src.data.text_rule import TextRule, find_separator, template
from src.data.tokenizer import load_tokenizer, vocabulary_size
from src.errors import CheckpointError, DataError
from src.interop.blocks import BlockFamily, Values
from src.interop.families import ImportCheckpoint
from src.interop.names import Correspondence
from src.interop.official import read_weights, require_new, require_shapes, run_config_values
from src.interop.reader import CheckpointTensors, read_json
from src.model import ModelConfig, Transformer
from src.run_directory import RunDirectory
from src.system.console import Progress, no_progress
from src.system.files import atomic_directory, write_text

KEPT = "huggingface"
"""The folder inside a run for files that came with it."""
KEPT_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*"),
)
OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt", "merges.txt")
"""Files of tokenizers that need more than `tokenizers` to be read."""
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BLOCK_FAMILIES: dict[str, BlockFamily] = {}
MODEL_TYPES: dict[str, ImportCheckpoint] = {}
"""What reads folders, by the `model_type` of their config.json."""


def register_blocks(family: BlockFamily) -> None:
    """Let `convert --from hf` read folders of `family`."""

    def import_blocks(
        checkpoint_dir: Path, run_dir: Path, *, top_k: int, tokenizer: Path | None, progress: Progress
    ) -> None:
        del top_k  # no experts
        import_folder_of_blocks(family, checkpoint_dir, run_dir, tokenizer=tokenizer, progress=progress)

    BLOCK_FAMILIES[family.model_type] = family
    MODEL_TYPES[family.model_type] = import_blocks


def import_huggingface(
    checkpoint_dir: Path | str,
    run_dir: Path | str,
    *,
    top_k: int = 2,
    tokenizer: Path | None = None,
    progress: Progress = no_progress,
) -> None:
    """Read a folder of transformers into a new run directory; weights keep their precision, bit for bit.

    `tokenizer` replaces the folder's own. `top_k` is for models with experts whose config.json does not say it.

    Raises:
        CheckpointError: the folder is not complete, its model cannot be expressed, or `run_dir` exists.
        DataError: the tokenizer cannot be read, has more ids than the model, or none that is known to end documents.
    """
    source = Path(checkpoint_dir)
    path = source / "config.json"
    model_type = read_json(path).get("model_type")
    if model_type not in MODEL_TYPES:
        known = ", ".join(sorted(MODEL_TYPES))
        raise CheckpointError(f"{path}: model_type is {model_type!r}, but only {known} are supported here")
    MODEL_TYPES[str(model_type)](source, Path(run_dir), top_k=top_k, tokenizer=tokenizer, progress=progress)


def import_folder_of_blocks(
    family: BlockFamily, source: Path, target: Path, *, tokenizer: Path | None, progress: Progress
) -> None:
    """Read a folder of `family`; raises as `import_huggingface` does."""
    require_new(target)
    path = source / "config.json"
    values = read_json(path)
    config, checkpoint = family.read_config(values, str(path)), CheckpointTensors(source)
    entries = family.correspondences(config)
    _drop_tied_copy(checkpoint, config, path)
    require_shapes(checkpoint.shapes, expected_shapes(config, entries), source)
    rule = _text_rule(source, values, tokenizer, config.vocab_size)
    with atomic_directory(target) as directory, progress("reading tensors", len(entries)) as advance:
        run = RunDirectory(directory)
        run.write_config(run_config_values(config, target, rule), None if rule is None else rule.record())
        if rule is not None:
            write_text(run.tokenizer_path, rule.tokenizer.to_str(pretty=True))
        keep_files(source, directory / KEPT)
        weights = dict[str, Tensor]()
        for entry in entries:
            weights |= read_weights(checkpoint, [entry], source)
            advance(1)
        _require_one_precision(entries, weights, source)
        run.write_weights(weights)


def expected_shapes(config: ModelConfig, entries: list[Correspondence]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a folder."""
    with torch.device("meta"):
        weights = Transformer(config).state_dict()
    assert weights.keys() == {entry.ours for entry in entries}
    return {
        name: tuple(part.shape)
        for entry in entries
        for name, part in zip(entry.theirs, entry.split(weights[entry.ours]), strict=True)
    }


def keep_files(source: Path, target: Path) -> None:
    """Copy the texts of a folder: settings, tokenizer, chat templates and licenses."""
    for pattern in KEPT_FILES:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                place = target / path.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)


def _drop_tied_copy(checkpoint: CheckpointTensors, config: ModelConfig, path: Path) -> None:
    """Leave out the head of a tied model, which some folders hold beside the embedding."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not config.tie_embeddings or head not in checkpoint.shapes or embedding not in checkpoint.shapes:
        return
    if not torch.equal(checkpoint.tensor(head), checkpoint.tensor(embedding)):
        raise CheckpointError(
            f"{path}: tie_word_embeddings is True, but {head} differs from {embedding}; set it to false to keep both"
        )
    del checkpoint.shapes[head]


def _require_one_precision(entries: Iterable[Correspondence], weights: Mapping[str, Tensor], where: Path) -> None:
    dtypes = {entry.theirs[0]: weights[entry.ours].dtype for entry in entries}
    first, expected = next(iter(dtypes.items()))
    if expected not in PRECISIONS:
        names = ", ".join(str(dtype) for dtype in PRECISIONS)
        raise CheckpointError(f"{where}: {first} is {expected}, but weights must be one of {names}")
    for name, dtype in dtypes.items():
        if dtype != expected:
            raise CheckpointError(
                f"{where}: {name} is {dtype}, but {first} is {expected}; save the checkpoint in one precision"
            )


def _require_no_other_tokenizer(source: Path) -> None:
    for name in OTHER_TOKENIZERS:
        if (source / name).is_file():
            raise CheckpointError(
                f"{source / name}: only tokenizer.json can be read, and the folder has none; let transformers write it "
                "with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), or pass one with --tokenizer"
            )


def _text_rule(source: Path, values: Values, given: Path | None, vocab_size: int) -> TextRule | None:
    """Return the rule of the folder's tokenizer: what its template puts around a text, and the ids that end one.

    As in transformers, the template decides, whatever `add_bos_token` in tokenizer_config.json says.
    """
    path = given or source / "tokenizer.json"
    if given is None and not path.is_file():
        _require_no_other_tokenizer(source)
        return None
    tokenizer = load_tokenizer(path)
    if (size := vocabulary_size(tokenizer)) > vocab_size:
        raise DataError(
            f"{path}: has {size} ids, but the model's vocabulary has {vocab_size}; "
            "pass the tokenizer that the model was trained with"
        )
    before, after = template(tokenizer)
    ends = [*_end_ids(values), *_end_ids(_optional_json(source / "generation_config.json"))]
    ends = [token_id for token_id in ends if tokenizer.id_to_token(token_id) is not None]
    after = after or (ends[0] if ends else find_separator(tokenizer, str(path)),)
    stops = tuple(dict.fromkeys(token_id for token_id in ends if token_id != after[-1]))
    return TextRule(tokenizer, after[-1], before, after, stops)


def _end_ids(values: Values) -> list[int]:
    found = values.get("eos_token_id")
    return [each for each in (found if isinstance(found, list) else [found]) if type(each) is int and each >= 0]


def _optional_json(path: Path) -> dict[str, object]:
    return read_json(path) if path.is_file() else {}
