"""Hugging Face datasets: what the hub would serve, read by `datasets` from local folders of the same layout."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from src.config import load_config
from src.data.config import DataConfig, SourceConfig, TokenizerConfig
from src.data.corpus import Document, read_source
from src.data.packed_corpus import prepare_corpus
from src.data.records import hub_rows
from src.errors import DataError
from tests.conftest import CONFIGS
from tests.data.corpora import all_documents, config_for, sentences

ARTICLES = [f" = Title {number} = \n\n = = Section = = \n text {number} of it \n" for number in range(60)]
COLUMNS = {
    "tinystories": ["text"],
    "wikitext-103": ["text"],
    "fineweb-edu": ["text", "id", "dump", "url", "language", "score"],
    "pile-deduplicated": ["text"],
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def hub_folder(folder: Path, texts: list[str], columns: list[str], subset: str | None = None) -> Path:
    """Write a dataset as the hub lays it out: Parquet files, and a card that names subsets."""
    target = folder / "dataset" / (subset or "data")
    target.mkdir(parents=True)
    for part in range(2):
        rows = texts[part * len(texts) // 2 : (part + 1) * len(texts) // 2]
        table = pyarrow.table({column: rows if column == "text" else ["x"] * len(rows) for column in columns})
        pyarrow.parquet.write_table(table, target / f"train-{part:05d}-of-00002.parquet", row_group_size=10)
    if subset is not None:
        files = f"configs:\n- config_name: {subset}\n  data_files:\n  - split: train\n    path: {subset}/*.parquet"
        (folder / "dataset" / "README.md").write_text(f"---\n{files}\n---\n")
    return folder / "dataset"


def data_of(name: str) -> DataConfig:
    return load_config(CONFIGS / "data" / f"{name}.yaml").data


def test_every_ready_config_is_tested() -> None:
    assert {path.stem for path in (CONFIGS / "data").glob("*.yaml")} == set(COLUMNS)


@pytest.mark.parametrize(
    ("name", "hub", "subset", "streaming", "tokenizer"),
    [
        ("tinystories", "roneneldan/TinyStories", None, False, None),
        ("wikitext-103", "Salesforce/wikitext", "wikitext-103-raw-v1", False, None),
        ("fineweb-edu", "HuggingFaceFW/fineweb-edu", "sample-10BT", True, "EleutherAI/gpt-neox-20b"),
        ("pile-deduplicated", "EleutherAI/the_pile_deduplicated", None, True, "EleutherAI/gpt-neox-20b"),
    ],
)
def test_the_fields_of_a_ready_config(
    name: str, hub: str, subset: str | None, streaming: bool, tokenizer: str | None
) -> None:
    data = data_of(name)
    (source,) = data.all_sources()
    assert (source.hub, source.subset, source.split, source.streaming) == (hub, subset, "train", streaming)
    assert source.text_field == "text"
    assert data.tokenizer.hub == tokenizer
    assert (source.document_start is not None) == (name == "wikitext-103")


@pytest.mark.parametrize("name", COLUMNS)
def test_a_ready_config_reads_what_the_hub_would_serve(name: str, tmp_path: Path) -> None:
    (source,) = data_of(name).all_sources()
    is_wikitext = source.document_start is not None
    documents = ARTICLES if is_wikitext else sentences(60)
    rows = "".join(ARTICLES).splitlines(keepends=True) if is_wikitext else documents
    rows = ["" if row == "\n" else row for row in rows]
    folder = hub_folder(tmp_path, rows, COLUMNS[name], source.subset)
    config = config_for(tmp_path / "cache", replace(source, hub=str(folder)))
    assert sorted(all_documents(prepare_corpus(config))) == sorted(documents)


@pytest.mark.parametrize("streaming", [False, True])
def test_reading_a_hub_dataset_goes_on_behind_any_document(streaming: bool, tmp_path: Path) -> None:
    source = SourceConfig(hub=str(hub_folder(tmp_path, sentences(30), ["text"])), streaming=streaming)
    items = [item for item in read_source(source, []) if isinstance(item, Document)]
    assert [item.text for item in items] == sentences(30)
    for index in (0, 14, 15, 29):
        rest = [item.text for item in read_source(source, [], items[index].end) if isinstance(item, Document)]
        assert rest == sentences(30)[index + 1 :]


def test_a_local_dataset_that_changes_is_noticed(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path, sentences(60), ["text"])
    config = config_for(tmp_path / "cache", SourceConfig(hub=str(folder), streaming=True))
    before = prepare_corpus(config).fingerprint
    pyarrow.parquet.write_table(pyarrow.table({"text": ["new"]}), folder / "data" / "train-00001-of-00002.parquet")
    after = prepare_corpus(config)
    assert after.fingerprint != before
    assert sorted(all_documents(after)) == sorted([*sentences(60)[:30], "new"])


def test_rows_are_known_where_the_description_says(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path, sentences(10), ["text"])
    assert hub_rows(SourceConfig(hub=str(folder))) is None
    assert hub_rows(SourceConfig(hub="nobody/nothing")) is None


def test_what_cannot_be_had_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"could not download nobody/nothing, split 'train', from the Hugging Face Hub: .+; check the name",
    ):
        prepare_corpus(DataConfig(sources=[SourceConfig(hub="nobody/nothing")], cache_dir=str(tmp_path)))
    folder = hub_folder(tmp_path, sentences(10), ["id", "text"])
    for source, message in (
        (
            SourceConfig(hub=str(folder), split="tests"),
            r"could not download .+, split 'tests', from .+ your network or HF_TOKEN$",
        ),
        (SourceConfig(hub=str(folder), text_field="body"), r"has no column 'body', only id, text; set text_field to"),
    ):
        with pytest.raises(DataError, match=message):
            prepare_corpus(replace(config_for(tmp_path / "cache", source), tokenizer=TokenizerConfig()))


def test_a_stream_that_breaks_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaking:
        column_names = None

        def skip(self, count: int) -> Iterator[dict[str, str]]:
            yield {"text": "one"}
            raise ConnectionError("Server Disconnected")

    def opened(source: SourceConfig) -> Breaking:
        assert source.streaming
        return Breaking()

    monkeypatch.setattr("src.data.records._open", opened)
    reading = read_source(SourceConfig(hub="some/corpus", streaming=True), [])
    assert isinstance(next(reading), Document)
    with pytest.raises(DataError, match=r"some/corpus: reading stopped at row 2 \(ConnectionError: Server Disc.*again"):
        next(reading)
