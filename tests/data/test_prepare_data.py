"""The verb: prepares, reports every source, does nothing twice; its mistakes are one line."""

import json
from pathlib import Path

import pytest

from src.errors import DataError
from src.prepare_data import main
from tests.conftest import CONFIGS
from tests.data.corpora import sentences, write_as

QUICKSTART = str(CONFIGS / "quickstart.yaml")


def arguments(folder: Path, *more: str) -> list[str]:
    sources = f"[{{name: prose, files: [{folder}/a.jsonl], weight: 2}}, {{files: [{folder}/b.parquet], weight: 1}}]"
    return [
        "--config",
        QUICKSTART,
        f"data.sources={sources}",
        f"data.cache_dir={folder}/cache",
        "data.tokenizer.vocab_size=300",
        "data.sequence_length=64",
        "data.validation_fraction=0.2",
        *more,
    ]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_as("a.jsonl", tmp_path, [*sentences(100), *sentences(3), "", " "])
    write_as("b.parquet", tmp_path, sentences(400, seed=1))
    return tmp_path


def test_it_reports_every_source(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments(corpus, "--json", f"{corpus}/report.json"))
    report = json.loads((corpus / "report.json").read_text())
    prose, other = report["sources"]
    assert (prose["name"], prose["documents"], prose["duplicates"], prose["skipped"]) == ("prose", 100, 3, {"empty": 2})
    assert (other["name"], other["documents"], other["duplicates"], other["skipped"]) == (
        f"{corpus}/b.parquet",
        400,
        0,
        {},
    )
    assert 0 < prose["held_out_documents"] < 50
    size = sum(len(text.encode()) for text in sentences(100))
    assert prose["bytes_per_token"] * prose["tokens"] == pytest.approx(size)
    assert 30 < other["unique_ids_per_16k"] < 300
    shown = capsys.readouterr().out
    assert "prose" in shown and "2 empty" in shown
    assert f"first empty record of prose: {corpus}/a.jsonl:104: no text" in shown


def test_a_second_call_does_nothing_and_says_the_same(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments(corpus))
    stamps = {path: path.stat().st_mtime_ns for path in (corpus / "cache").rglob("*") if path.is_file()}
    first = capsys.readouterr().out
    main(arguments(corpus))
    assert capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_tokenizer_larger_than_the_model_is_refused(corpus: Path) -> None:
    main(arguments(corpus))
    (tokenizer,) = (corpus / "cache").glob("tokenizer-*.json")
    given = arguments(corpus, f"data.tokenizer.path={tokenizer}", "model.vocab_size=200", "data.tokenizer.vocab_size=1")
    with pytest.raises(DataError, match=r"model.vocab_size: 200, but the tokenizer has 300 ids; set model.vocab_size="):
        main(given)
