"""Every kind of damage to a table is named by `verify_table`; a read returns the right row or a named error."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import LutError, LutFormatError
from src.lut import LutStore, build_lut, read_manifest
from src.lut.verification import verify_table
from tests.lut.builds import SHARD_BYTES, FixedRows, contents, random_rows


def sealed_text(document: dict[str, object]) -> str:
    """The file of a document whose checksum is right, whatever it says."""
    body = {key: value for key, value in document.items() if key != "sha256"}
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": seal}, indent=1) + "\n"


ROW_BYTES = 3 * 3 * 32 * 4
FIRST, SECOND = "rows-00000.safetensors", "rows-00001.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lut_dir = tmp_path_factory.mktemp("sound") / "lut"
    source = FixedRows(random_rows())
    build_lut(source, lut_dir, dtype="float32", shard_bytes=SHARD_BYTES, token_counts=torch.arange(23))
    return lut_dir


@pytest.fixture
def table(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "lut")
    return tmp_path / "lut"


def flip(path: Path, offset: int, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)


def test_a_sound_table_has_no_problems_and_every_row_is_counted(sound: Path) -> None:
    counted: list[int] = []
    assert verify_table(sound, counted.append) == []
    assert sum(counted) == 23


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        (0, "its header is damaged"),
        (7, "its header is damaged"),
        (20, "its header is damaged"),
        (4095, "its header is damaged"),
        (4096, "the row of token id 5 is damaged"),
        (4096 + 2 * ROW_BYTES, "the row of token id 7 is damaged"),
        (4096 + 5 * ROW_BYTES - 1, "the row of token id 9 is damaged"),
        (4096 + 5 * ROW_BYTES + 4 * 3, "the row of token id 8 is damaged"),
    ],
)
def test_a_flipped_byte_of_a_shard_is_named(offset: int, expected: str, table: Path) -> None:
    flip(table / SECOND, offset)
    problems = verify_table(table)
    assert len(problems) == 1
    assert SECOND in problems[0]
    assert expected in problems[0]


def exchange_shards(table: Path) -> None:
    first, second = (table / FIRST).read_bytes(), (table / SECOND).read_bytes()
    (table / FIRST).write_bytes(second)
    (table / SECOND).write_bytes(first)


def exchange_rows(table: Path) -> None:
    content = bytearray((table / FIRST).read_bytes())
    one, two = slice(4096, 4096 + ROW_BYTES), slice(4096 + ROW_BYTES, 4096 + 2 * ROW_BYTES)
    content[one], content[two] = content[two], content[one]
    (table / FIRST).write_bytes(content)


def edit_manifest(table: Path) -> None:
    text = (table / "manifest.json").read_text()
    (table / "manifest.json").write_text(text.replace('"num_layers": 3', '"num_layers": 4'))


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda table: os.truncate(table / FIRST, 5000), r"rows-00000.safetensors: 5,000 bytes, expected [\d,]+"),
    (lambda table: (table / SECOND).unlink(), "rows-00001.safetensors: missing, but the manifest lists it"),
    (exchange_shards, "rows-00000.safetensors: its header is damaged or of another shard"),
    (exchange_rows, "the row of token id 0 is damaged.*"),
    (edit_manifest, "manifest.json: its text does not match its sizes and its sha256, so it was edited or damaged"),
    (lambda table: (table / "rows-00009.safetensors").write_bytes(b"x"), "rows-00009.safetensors: is not part of"),
    (lambda table: flip(table / "token_counts.safetensors", 90), "token_counts.safetensors: .*not what the"),
    (lambda table: (table / "manifest.json").unlink(), "manifest.json: missing, so the table is unfinished"),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGES)
def test_damage_is_named(damage: Callable[[Path], object], expected: str, table: Path) -> None:
    damage(table)
    problems = verify_table(table)
    assert problems
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError("\n".join(problems))


@pytest.mark.parametrize("reader", ["memmap", "pread"])
def test_exchanged_rows_are_found_by_reading_them(reader: str, table: Path) -> None:
    exchange_rows(table)
    with LutStore.open(table, reader=reader) as store:
        store.gather(torch.tensor([2, 3]))
        with pytest.raises(LutFormatError, match="the row of token id 1 is damaged"):
            store.gather(torch.tensor([2, 1]))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_is_found_and_never_gives_a_wrong_row(sound: Path, data: st.DataObject) -> None:
    files = contents(sound)
    file = data.draw(st.sampled_from(sorted(files)))
    offset = data.draw(st.integers(0, len(files[file]) - 1))
    mask = data.draw(st.integers(1, 255))
    damaged = bytearray(files[file])
    damaged[offset] ^= mask
    (sound / file).write_bytes(damaged)
    try:
        assert verify_table(sound)
        _require_right_rows(sound)
    finally:
        (sound / file).write_bytes(files[file])


def _require_right_rows(lut_dir: Path) -> None:
    rows = random_rows()
    try:
        with LutStore.open(lut_dir, reader="pread") as store:
            for token_id in range(23):
                try:
                    assert torch.equal(store.gather(torch.tensor([token_id]))[0], rows[token_id])
                except LutError as error:
                    assert "damaged" in str(error)
    except LutError as error:
        assert str(lut_dir) in str(error)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**18, 10**40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_manifest_with_junk_in_it_is_a_named_error_even_with_a_right_seal(sound: Path, data: st.DataObject) -> None:
    text = (sound / "manifest.json").read_text()
    document = json.loads(text)
    key = data.draw(st.sampled_from(sorted(document)))
    target = document
    if key == "shards" and data.draw(st.booleans()):
        target = document["shards"][data.draw(st.integers(0, 3))]
        key = data.draw(st.sampled_from(sorted(target)))
    if key == "sha256":  # it is computed below
        return
    value = data.draw(JUNK)
    if type(value) is type(target[key]) and value == target[key]:
        return
    if data.draw(st.booleans()):
        target[key] = value
    else:
        del target[key]
    free_text = {"tokenizer", "training_form", "backbone", "rows_from", "token_counts_sha256"}
    (sound / "manifest.json").write_text(sealed_text(document))
    try:
        try:
            read_manifest(sound)
            assert key in free_text  # nothing else says what these should be: `verify` compares them with the run
            assert isinstance(value, str | None)
        except LutFormatError as error:
            assert "manifest.json" in str(error)
            assert len(str(error)) < 500
    finally:
        (sound / "manifest.json").write_text(text)


@pytest.mark.parametrize(
    "written",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format_version": ' + b"9" * 5000 + b"}",
        b"[]",
        b"null",
        b'{"format_version": true}',
        b'{"format_version": 99}',
        b'{"format_version": 0}',
        b'{"format_version": 1}',
        b'{"format_version": {"a": [' + b"[" * 900 + b"]" * 900 + b"]}}",
    ],
)
def test_files_that_are_no_manifest_are_named_errors(written: bytes, table: Path) -> None:
    (table / "manifest.json").write_bytes(written)
    with pytest.raises(LutFormatError, match=r"manifest.json: "):
        read_manifest(table)


def test_a_newer_table_is_refused_by_name(table: Path) -> None:
    document = json.loads((table / "manifest.json").read_text()) | {"format_version": 7, "something_new": [1]}
    (table / "manifest.json").write_text(sealed_text(document))
    with pytest.raises(
        LutFormatError, match=r"format_version 7, but this version of mole reads 1 and 2; use the version"
    ):
        LutStore.open(table)


def test_absurd_sizes_with_a_right_seal_end_at_once(table: Path) -> None:
    for change in ({"vocab_size": 2**31}, {"hidden_size": 2**31, "row_bytes": 3 * 3 * 2**33}, {"shard_bytes": 1}):
        document = json.loads((table / "manifest.json").read_text()) | change
        (table / "manifest.json").write_text(sealed_text(document))
        with pytest.raises(LutFormatError, match="its text does not match its sizes"):
            read_manifest(table)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_shard_headers_are_named_errors(sound: Path, data: st.DataObject) -> None:
    """Whole headers are replaced, so that the length in front of them may say anything."""
    path = sound / FIRST
    content = path.read_bytes()
    header = data.draw(st.binary(min_size=1, max_size=200))
    path.write_bytes(header + content[len(header) :])
    try:
        if content.startswith(header):
            return
        with pytest.raises(LutFormatError, match=r"rows-00000.safetensors: its header is damaged"):
            LutStore.open(sound)
        assert any(FIRST in problem for problem in verify_table(sound))
    finally:
        path.write_bytes(content)
