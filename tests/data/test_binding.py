"""One tokenizer for data, model and table: another one is refused, with both names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from src import generate
from src.config import load_run_config
from src.data import tokenizer as tokenizer_module
from src.data.tokenizer import canonical_json, fingerprint, load_tokenizer, train_bpe
from src.errors import DataError
from src.evaluation.held_out import held_out_of_run
from src.run_directory import RunDirectory
from src.train import RunResult
from tests.data.corpora import sentences


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = train_bpe(iter(sentences(20)), 300)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[SEP]", 2), ("[CLS]", 1)]
    )
    return tokenizer


def unigram_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581caf\u00e9\t", -1e-7), ("b", -12.25)], 0, True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", lstrip=True)])
    return tokenizer


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"a": 1, "[UNK]": 0, "##b": 3}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("x", "isolated"), pre_tokenizers.Punctuation()]
    )
    tokenizer.post_processor = processors.RobertaProcessing(("[UNK]", 0), ("a", 1))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


RECORDED = {  # by releases that hashed what version 0.23.3 of the library writes
    byte_level_tokenizer: "cf2011881b9cb6f373499f191af752c18435c8f4bd2d77951614ca2d7ac01d16",
    unigram_tokenizer: "ed2cfb5699b5e5e8c94604012b79e86b94bd658f7ee014154f5b4b8fe3084b9b",
    word_tokenizer: "7b26e92a9a89baaac1cdabb0c81a62d648c73a49a6a58218cba63cb42228c6ea",
}


@pytest.mark.parametrize("make", RECORDED)
def test_identities_that_were_recorded_stay_valid(make: Callable[[], Tokenizer]) -> None:
    assert fingerprint(make()) == RECORDED[make]


@pytest.mark.parametrize("make", RECORDED)
def test_the_order_of_keys_does_not_change_the_identity(make: Callable[[], Tokenizer]) -> None:
    def backwards(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: backwards(value[key]) for key in reversed(value)}
        return [backwards(item) for item in value] if isinstance(value, list) else value

    text = make().to_str()
    turned = json.dumps(backwards(json.loads(text)), indent=1).replace("e-07", "e-7")  # Python's way
    assert canonical_json(turned) == canonical_json(text)


@pytest.mark.parametrize(
    ("kind", "field", "default", "other"),
    [
        ("BPE", "ignore_merges", False, True),
        ("ByteLevel", "use_regex", True, False),
        ("BPE", "fuse_unk", False, True),
    ],
)
def test_a_field_of_a_newer_library_counts_unless_it_holds_its_default(
    kind: str, field: str, default: bool, other: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library stands in for a newer one: it writes a field that is taken out of the list of known ones."""
    text = byte_level_tokenizer().to_str()
    assert f'"{field}":{json.dumps(default)}' in text
    known = tokenizer_module._FIELDS[kind].replace(field, "")
    monkeypatch.setitem(tokenizer_module._FIELDS, kind, known)
    assert field not in canonical_json(text)
    assert field in canonical_json(text.replace(f'"{field}":{json.dumps(default)}', f'"{field}":{json.dumps(other)}'))


@pytest.mark.parametrize(
    ("found", "other"),
    [
        ('"add_prefix_space":false', '"add_prefix_space":true'),
        ('"special":true', '"special":false'),
        ('"normalizer":null', '"normalizer":{"type":"NFC"}'),
        ('"ids":[1]', '"ids":[3]'),
        ('"vocab":{"<|endoftext|>":0,"!":1,', '"vocab":{"!":0,"<|endoftext|>":1,'),
    ],
)
def test_what_changes_ids_changes_the_identity(found: str, other: str) -> None:
    text = byte_level_tokenizer().to_str()
    assert text.count(found) == 1
    assert canonical_json(text.replace(found, other)) != canonical_json(text)


def test_a_run_with_another_tokenizer_is_refused(trained: RunResult, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(trained.run_dir, run.path, ignore=shutil.ignore_patterns("checkpoints"))
    expected = fingerprint(load_tokenizer(run.tokenizer_path))[:12]
    train_bpe(iter(sentences(100)), 300).save(str(run.tokenizer_path))
    found = fingerprint(load_tokenizer(run.tokenizer_path))[:12]
    model = rf"{run.path} \(as its report.json says\): made with tokenizer {expected}"
    with pytest.raises(DataError, match=rf"{model}, but {run.tokenizer_path} has tokenizer {found}; their ids mean"):
        held_out_of_run(run, load_run_config(run).data)
    run.report_path.unlink()
    with pytest.raises(
        DataError, match=rf"{run.path}/lut: made with tokenizer {expected}, but .+ has tokenizer {found}"
    ):
        generate.main(["--run", str(run.path), "--prompt", "x"])
