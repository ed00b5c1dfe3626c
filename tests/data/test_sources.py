"""Every format gives the same documents; reading goes on anywhere; what is wrong with a record is told."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from src.benchmarks.workload import load_text_ids, read_texts
from src.data import corpus as documents
from src.data import records
from src.data.config import SourceConfig
from src.data.corpus import Document, Position, Skipped, read_source
from src.data.files import source_files
from src.data.packed_corpus import prepare_corpus
from src.data.records import read_records
from src.errors import DataError
from tests.data.corpora import all_documents, config_for, json_lines, sentences, write_as, write_parquet

FORMATS = ["t.jsonl", "t.jsonl.gz", "t.jsonl.zst", "t.json", "t.json.gz", "t.json.zst", "t.parquet"]


def zstd(raw: bytes) -> bytes:
    return pyarrow.compress(raw, "zstd", asbytes=True)


def texts_of(source: SourceConfig, start: Position = Position()) -> list[str]:  # noqa: B008 - immutable
    return [item.text for item in read_source(source, source_files(source), start) if isinstance(item, Document)]


def skipped_of(source: SourceConfig) -> list[tuple[str, str, str]]:
    found = [item for item in read_source(source, source_files(source)) if isinstance(item, Skipped)]
    return [(item.problem, Path(item.where).name, item.detail) for item in found]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    texts = sentences(40)
    path = write_as(name, tmp_path, texts)
    assert texts_of(SourceConfig(files=[str(path)])) == texts


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.jsonl.zst", "t.parquet", "t.jsonl"])
def test_every_format_can_be_prepared(name: str, tmp_path: Path) -> None:
    path = write_as(name, tmp_path, sentences(60))
    corpus = prepare_corpus(config_for(tmp_path / "cache", SourceConfig(files=[str(path)])))
    assert sorted(all_documents(corpus)) == sorted(sentences(60))


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document(suffix: str, tmp_path: Path) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstd}[suffix]
    for number, text in enumerate(sentences(3)):
        (tmp_path / f"{number}.txt{suffix}").write_bytes(pack(text.encode()))
    assert texts_of(SourceConfig(files=[f"{tmp_path}/*"])) == sentences(3)
    assert texts_of(SourceConfig(files=[str(tmp_path)])) == sentences(3)


@pytest.mark.parametrize("name", FORMATS)
def test_reading_goes_on_behind_any_document(name: str, tmp_path: Path) -> None:
    texts = sentences(40)
    source = SourceConfig(files=[str(write_as(f"{part}-{name}", tmp_path, texts[part::2])) for part in range(2)])
    items = list(read_source(source, source_files(source)))
    for index in (0, 1, 18, 19, 20, 38, 39):
        item = items[index]
        assert isinstance(item, Document)
        assert texts_of(source, item.end) == [*texts[0::2], *texts[1::2]][index + 1 :]


def test_a_long_text_file_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "TEXT_BYTES", 100)
    text = "".join(f"line {number} of naïve 日本語 text\n" for number in range(20)) + "日" * 83
    (tmp_path / "long.txt").write_text(text)
    source = SourceConfig(files=[str(tmp_path / "long.txt")])
    items = [item for item in read_source(source, source_files(source)) if isinstance(item, Document)]
    assert "".join(item.text for item in items) == text
    assert 90 < max(len(item.text.encode()) for item in items) <= 100
    assert sum(item.text.endswith("\n") for item in items) > len(items) - 5
    first_lines = [1 + text[: text.index(item.text)].count("\n") for item in items[:5]]
    assert [item.where for item in items[:5]] == [f"{tmp_path}/long.txt:{line}" for line in first_lines]
    assert texts_of(source, items[3].end) == [item.text for item in items[4:]]


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.parquet"])
def test_rows_are_joined_into_documents(name: str, tmp_path: Path) -> None:
    articles = [f" = Title {number} = \n\n = = Section = = \n text {number} \n" for number in range(9)]
    rows = "".join(articles).splitlines(keepends=True)
    rows = [row if row.strip() else "" for row in rows] if name != "t.txt" else rows
    path = tmp_path / name
    path.write_text("".join(rows)) if name == "t.txt" else write_as(name, tmp_path, rows)
    source = SourceConfig(files=[str(path)], document_start=" = [^=]")
    assert texts_of(source) == articles
    items = [item for item in read_source(source, source_files(source)) if isinstance(item, Document)]
    assert [texts_of(source, item.end) for item in items] == [articles[number:] for number in range(1, 10)]
    assert sum(item.num_records for item in items) == len(rows)


def test_rows_that_open_no_document_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "TEXT_BYTES", 1000)
    (tmp_path / "t.txt").write_text("".join(sentences(100)))
    found = texts_of(SourceConfig(files=[f"{tmp_path}/t.txt"], document_start="never"))
    assert "".join(found) == "".join(sentences(100))
    assert len(found) > 5


def test_what_is_wrong_with_a_record_is_told_with_its_line(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": "caf\xe9"}',
        b'{"text": "cut off',
        b'{"title": "no text", "id": 3}',
        b'{"text": null}',
        b'{"text": " \\n"}',
        b"",
        b'"a bare string"',
        b'{"text": "half \\ud800 a pair"}',
        b"[" * 100_000,
    ]
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    source = SourceConfig(files=[f"{tmp_path}/t.jsonl"])
    assert texts_of(source) == ["good", "a bare string"]
    assert skipped_of(source) == [
        ("malformed UTF-8", "t.jsonl:2", "not UTF-8 at byte 13 of the line"),
        ("broken JSON", "t.jsonl:3", "not JSON: Unterminated string starting at: line 1 column 10 (char 9)"),
        ("missing text", "t.jsonl:4", "no key 'text' (found title, id)"),
        ("empty", "t.jsonl:5", "no text"),
        ("empty", "t.jsonl:6", "no text"),
        ("empty", "t.jsonl:7", "no text"),
        ("malformed UTF-8", "t.jsonl:9", "half a surrogate pair at character 5"),
        (
            "broken JSON",
            "t.jsonl:10",
            "not JSON: maximum recursion depth exceeded while decoding a JSON array from a unicode string",
        ),
    ]


def test_a_text_file_in_the_wrong_encoding_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("one\ntwo\nthe café\n".encode("latin-1"))
    (tmp_path / "wide.txt").write_bytes("wide".encode("utf-16"))
    (tmp_path / "empty.txt").write_bytes(b"")
    assert skipped_of(SourceConfig(files=[str(tmp_path)])) == [
        ("empty", "empty.txt:1", "no text"),
        ("malformed UTF-8", "latin.txt:3", "not UTF-8 at byte 7 of the line"),
        ("not text", "wide.txt:1", "a NUL byte, as in binary files and UTF-16, at byte 3 of the line"),
    ]


def test_parquet_with_nulls_and_other_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", ["one", None, "", "four"], column="content")
    source = SourceConfig(files=[str(path)], text_field="content")
    assert texts_of(source) == ["one", "four"]
    assert [(problem, where) for problem, where, _ in skipped_of(source)] == [
        ("empty", "t.parquet:2"),
        ("empty", "t.parquet:3"),
    ]
    raw = pyarrow.array([b"good", b"caf\xe9"], pyarrow.binary())
    latin = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())  # what a careless writer leaves
    pyarrow.parquet.write_table(pyarrow.table({"text": latin}), tmp_path / "latin.parquet")
    source = SourceConfig(files=[f"{tmp_path}/latin.parquet"])
    assert texts_of(source) == ["good"]
    assert skipped_of(source) == [("malformed UTF-8", "latin.parquet:2", "not UTF-8 at byte 3 of the line")]
    with pytest.raises(DataError, match=r"t.parquet: has no column 'text', only id, content; set text_field to one of"):
        texts_of(SourceConfig(files=[str(path)]))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'[{"text": "a"}, {"text": "b"', r"t.json:1: not a JSON array \(Expecting ',' delimiter"),
        (b'[\n"a",\n"b"', r"t.json:3: not a JSON array \(the array is cut off\)"),
        (b'[\n"a"\n"b"]', r"t.json:3: not a JSON array \(expected ','\)"),
        (b'[\n"a",\n"\xff"]', r"t.json:1: not a JSON array \(not UTF-8"),
    ],
)
def test_a_broken_json_array_is_one_error(raw: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        list(read_records(tmp_path / "t.json", "text", lines=False))


def test_json_arrays_longer_than_the_buffer(tmp_path: Path) -> None:
    texts = [*sentences(10), "x" * 3_000_000, *sentences(30_000, seed=1, words=10)]
    (tmp_path / "t.json").write_text(" [" + ",\n".join(map(json.dumps, texts)) + "]\n")
    assert texts_of(SourceConfig(files=[f"{tmp_path}/t.json"])) == texts
    (tmp_path / "none.json").write_text("[ ]")
    assert texts_of(SourceConfig(files=[f"{tmp_path}/none.json"])) == []


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress(json_lines(sentences(5))))
    assert texts_of(SourceConfig(files=[f"{tmp_path}/c4.json.gz"])) == sentences(5)


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.jsonl.zst", "t.parquet"])
@pytest.mark.parametrize("damage", ["cut off", "not even that"])
def test_damaged_files_are_named(name: str, damage: str, tmp_path: Path) -> None:
    path = write_as(name, tmp_path, sentences(300))
    path.write_bytes(path.read_bytes()[:-300] if damage == "cut off" else b"this is text\n" * 5)
    with pytest.raises(DataError, match=rf"{name}: (damaged or cut off|not a readable Parquet file) \(.+\); fetch"):
        texts_of(SourceConfig(files=[str(path)]))


def test_two_zstd_frames_are_one_file(tmp_path: Path) -> None:
    halves = [zstd(json_lines(sentences(50, seed=seed))) for seed in range(2)]
    (tmp_path / "t.jsonl.zst").write_bytes(b"".join(halves))
    assert texts_of(SourceConfig(files=[f"{tmp_path}/t.jsonl.zst"])) == [*sentences(50), *sentences(50, seed=1)]


def test_places_without_text_get_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.files: '.*nothing\*' matches no file; give a path, a folder or a glob"):
        source_files(SourceConfig(files=[f"{tmp_path}/nothing*"]))
    with pytest.raises(DataError, match=r"the folder '.*' holds no file ending in .txt, .jsonl, .json or .parquet"):
        source_files(SourceConfig(files=[str(tmp_path)]))
    (tmp_path / "p.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(
        DataError, match=r"p.parquet.gz: Parquet compresses inside; unpack the file and drop its ending"
    ):
        texts_of(SourceConfig(files=[f"{tmp_path}/p.parquet.gz"]))


def test_a_glob_takes_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    for name in ("a.txt", "part/b.txt", "part/c.py"):
        (tmp_path / name).write_text(name)
    found = source_files(SourceConfig(files=[f"{tmp_path}/*"]))
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.txt", "part/b.txt"]


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LINE_BYTES", 1 << 20)
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "short"}\n' + b"x" * (1 << 21))
    with pytest.raises(DataError, match=r"t.jsonl:2: a line of more than 1 MiB, but a record is one line"):
        texts_of(SourceConfig(files=[f"{tmp_path}/t.jsonl"]))


PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".GZIP": gzip.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.json", "t.py"])
def test_a_byte_order_mark_is_no_text(name: str, packed: str, tmp_path: Path) -> None:
    raw = {".jsonl": b'{"text": "one"}\n', ".json": b'[{"text": "one"}]'}.get(Path(name).suffix, b"one")
    mark = b"\xef\xbb\xbf"
    (tmp_path / f"{name}{packed}").write_bytes(PACKERS[packed](mark + raw))
    assert texts_of(SourceConfig(files=[f"{tmp_path}/{name}{packed}"])) == ["one"]
    (tmp_path / "only.txt").write_bytes(mark)
    assert skipped_of(SourceConfig(files=[f"{tmp_path}/only.txt"])) == [("empty", "only.txt:1", "no text")]
    (tmp_path / "inside.txt").write_bytes(b"a" + mark)
    assert texts_of(SourceConfig(files=[f"{tmp_path}/inside.txt"])) == ["a\ufeff"]


def test_a_byte_order_mark_may_be_a_member_of_its_own(tmp_path: Path) -> None:
    for name, pack in (("t.txt.gz", gzip.compress), ("t.txt.zst", zstd)):
        (tmp_path / name).write_bytes(pack(b"\xef") + pack(b"\xbb\xbf") + pack(b"text"))
        assert texts_of(SourceConfig(files=[f"{tmp_path}/{name}"])) == ["text"]


@pytest.mark.parametrize(
    "ending", [".ndjson", ".JSONL", ".jl", ".jsonlines", ".NDJSON.gz", ".jsonl.GZIP", ".jsonl.zstd"]
)
def test_endings_are_known_by_their_usual_names(ending: str, tmp_path: Path) -> None:
    raw, last = json_lines(sentences(5)), ending.lower()
    packed = gzip.compress(raw) if last.endswith((".gz", ".gzip")) else zstd(raw) if last.endswith(".zstd") else raw
    (tmp_path / f"t{ending}").write_bytes(packed)
    assert texts_of(SourceConfig(files=[f"{tmp_path}/t{ending}"])) == sentences(5)
    assert texts_of(SourceConfig(files=[str(tmp_path)])) == sentences(5)


@pytest.mark.parametrize("ending", [".PARQUET", ".pq", ".Parq"])
def test_endings_of_parquet(ending: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / f"t{ending}", sentences(5))
    assert texts_of(SourceConfig(files=[f"{tmp_path}/t{ending}"])) == sentences(5)


@pytest.mark.parametrize("name", ["t.tar", "t.tar.gz", "t.tgz", "t.ZIP", "t.csv", "t.arrow", "t.jsonl.lz4", "t.pdf"])
def test_formats_that_are_not_read_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"text"))
    with pytest.raises(
        DataError, match=rf"/{name}: files ending in .+ are not read; unpack or convert it to .txt, .js"
    ):
        source_files(SourceConfig(files=[f"{tmp_path}/*"]))


@pytest.mark.parametrize(("name", "raw"), [("t.txt", b"one\nab\0c"), ("t.jsonl", b"\n{\0}"), ("t.me", b"\nPK\0\1")])
def test_a_file_with_nul_bytes_is_no_text(name: str, raw: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(raw)
    (problem, where, detail) = skipped_of(SourceConfig(files=[f"{tmp_path}/{name}"]))[-1]
    assert (problem, where) == ("not text", f"{name}:2")
    assert detail == f"a NUL byte, as in binary files and UTF-16, at byte {1 if name == 't.jsonl' else 2} of the line"
    with pytest.raises(
        DataError, match=rf"{name}:2: a NUL byte, .+ are not text, more than data.max_malformed_fraction"
    ):
        prepare_corpus(config_for(tmp_path / "cache", SourceConfig(files=[f"{tmp_path}/{name}"]), max_empty_fraction=1))


def test_unknown_endings_are_read_as_text_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, text in enumerate(sentences(60)):
        (tmp_path / f"{number}.{'bak' if number < 2 else 'md'}").write_text(text)
    prepare_corpus(config_for(tmp_path / "cache", SourceConfig(files=[f"{tmp_path}/*.*"])))
    assert (
        f"note: read as text, because their endings are unknown: {tmp_path}/0.bak and 1 more" in capsys.readouterr().err
    )


@pytest.mark.parametrize("folder", ["run [1]", "[a-z]", "a*b?", "plain"])
def test_what_exists_as_a_path_is_no_glob(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "t[0].txt").write_text("text")
    for pattern in (f"{folder}/t[0].txt", folder):
        assert texts_of(SourceConfig(files=[f"{tmp_path}/{pattern}"])) == ["text"]
        assert list(read_texts([f"{tmp_path}/{pattern}"])) == ["text"]
        assert load_text_ids([tmp_path / pattern], None, 300).held_out.numel() > 0
    (tmp_path / "t0.txt").write_text("found by a glob")
    assert texts_of(SourceConfig(files=[f"{tmp_path}/t[0].txt"])) == ["found by a glob"]


@pytest.mark.parametrize("window_log", [28, 31])
@pytest.mark.parametrize("name", ["t.jsonl.zst", "t.json.ZSTD"])
def test_zstandard_files_of_long_windows_are_read(name: str, window_log: int, tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    raw = json_lines(sentences(300))
    packed = packer.compress(raw) + packer.flush()
    assert zstandard.get_frame_parameters(packed).window_size == 1 << window_log
    (tmp_path / name).write_bytes(packed)
    assert texts_of(SourceConfig(files=[f"{tmp_path}/{name}"])) == sentences(300)
    (tmp_path / name).write_bytes(packed[:-9])
    with pytest.raises(DataError, match=rf"{name}: damaged or cut off \(the last frame has no end\); fetch"):
        texts_of(SourceConfig(files=[f"{tmp_path}/{name}"]))


BROKEN = {
    "a long integer": ("1" * 5000, "not JSON: Exceeds the limit (4300 digits) for integer string conversion"),
    "a long integer in a record": (
        f'{{"text": "]}},", "n": [-{"7" * 9999}]}}',
        "not JSON: Exceeds the limit (4300 digi",
    ),
    "deep lists": ("[" * 100_000 + "]" * 100_000, "not JSON: maximum recursion depth exceeded"),
    "deep objects": ('{"text":' * 9999 + '"\\"]"' + "}" * 9999, "not JSON: maximum recursion depth exceeded"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.json.gz"])
def test_json_that_cannot_be_held_is_a_broken_record(name: str, kind: str, tmp_path: Path) -> None:
    broken, detail = BROKEN[kind]
    items = [json.dumps({"text": "one"}), broken, json.dumps({"text": "two"}), broken]
    text = "\n".join(items) if name == "t.jsonl" else "[" + ",\n".join(items) + " ]"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    source = SourceConfig(files=[f"{tmp_path}/{name}"])
    assert texts_of(source) == ["one", "two"]
    assert [(problem, where) for problem, where, _ in skipped_of(source)] == [
        ("broken JSON", f"{name}:2"),
        ("broken JSON", f"{name}:4"),
    ]
    assert all(found.startswith(detail) and "sys." not in found for _, _, found in skipped_of(source))


@pytest.mark.parametrize(
    ("value", "found"),
    [([], "a list"), (["a"], "a list"), (3, "a number"), (2.5, "a number"), (True, "true or false"), ({}, "an object")],
)
@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_what_stands_in_the_place_of_text_is_told(name: str, value: object, found: str, tmp_path: Path) -> None:
    rows = [{"text": None}, {"text": value}, {"text": "good"}]
    raw = json.dumps(rows) if name == "t.json" else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(raw)
    source, last = SourceConfig(files=[f"{tmp_path}/{name}"]), 2 if name == "t.jsonl" else 1
    assert texts_of(source) == ["good"]
    assert skipped_of(source) == [
        ("empty", f"{name}:1", "no text"),
        ("missing text", f"{name}:{last}", f"no text in 'text' (found {found})"),
    ]


def test_null_and_other_types_of_parquet_columns(tmp_path: Path) -> None:
    for values, expected in (
        ([None, "b"], [("empty", "no text")]),
        ([["x"], None], [("missing text", "no text in 'text' (found a list)"), ("empty", "no text")]),
        ([4], [("missing text", "no text in 'text' (found a number)")]),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "t.parquet")
        found = skipped_of(SourceConfig(files=[f"{tmp_path}/t.parquet"]))
        assert [(problem, detail) for problem, _, detail in found] == expected
