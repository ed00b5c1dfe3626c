"""Tables that leave out ids: what is stored, what is read and what every reader returns, and what is noticed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from src.errors import LutError, LutFormatError
from src.lut import LutStore, build_lut, builder, read_manifest
from src.lut.builder import estimate
from src.lut.codecs import CODECS
from src.lut.layout import sha256
from src.lut.manifest import ROW_IDS_NAME
from src.lut.plan import plan
from src.lut.readers import READERS, ResidentTable
from src.lut.readers.reader import Arrived, Bytes, Finish, Wanted
from src.lut.verification import find_neighbors, verify_table
from tests.lut.builds import SHARD_BYTES, FixedRows, build_on_ranks, contents, random_rows

IDS = torch.tensor([0, 2, 3, 7, 11, 12, 13, 20, 22])
"""Of 23: the first and the last, neighbors and gaps."""
OTHERS = torch.tensor([token_id for token_id in range(23) if token_id not in IDS])
MIXED = torch.tensor([20, 1, 3, 21, 22, 0, 19, 4, 13])


class SparseRows(FixedRows):
    """`FixedRows` of some ids alone."""

    def __init__(self, rows: Tensor, row_ids: Tensor = IDS) -> None:
        super().__init__(rows)
        self.row_ids = row_ids
        self._rows = rows[row_ids]


def build(lut_dir: Path, dtype: str = "float32", hidden_size: int = 32, **options: object) -> Tensor:
    """Build a sparse table; return the rows (V, L, E, D) that it stands for, in float32."""
    rows = random_rows(hidden_size=hidden_size)
    source = SparseRows(rows)
    build_lut(source, lut_dir, dtype=dtype, shard_bytes=SHARD_BYTES, chunk_tokens=2, **options)  # pyright: ignore[reportArgumentType]
    rows[OTHERS] = 0
    return rows


def test_the_files_hold_the_rows_of_the_listed_ids_and_nothing_else(tmp_path: Path) -> None:
    rows = build(tmp_path / "sparse")
    build_lut(FixedRows(random_rows()), tmp_path / "all", dtype="float32", shard_bytes=SHARD_BYTES, chunk_tokens=2)
    document, layout = json.loads((tmp_path / "sparse/manifest.json").read_text()), read_manifest(tmp_path / "sparse")
    assert (document["format_version"], document["vocab_size"], document["sparse_rows"]) == (2, 23, 9)
    assert [shard["num_tokens"] for shard in document["shards"]] == [5, 4]
    stored = [load_file(tmp_path / "sparse" / shard.file_name)["rows"] for shard in layout.shards]
    assert torch.equal(torch.cat(stored), rows[IDS])
    assert torch.equal(load_file(tmp_path / "sparse" / ROW_IDS_NAME)["row_ids"], IDS)
    plain = json.loads((tmp_path / "all/manifest.json").read_text())
    assert plain["format_version"] == 1 and not {"sparse_rows", "row_ids_sha256"} & set(plain)


def test_its_size_is_that_of_its_rows(tmp_path: Path) -> None:
    rows, row_ids = torch.randn(4000, 3, 3, 128), torch.arange(0, 4000, 5)
    build_lut(SparseRows(rows, row_ids), tmp_path, dtype="bfloat16")
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size == pytest.approx(800 * 3 * 3 * 128 * 2, rel=0.02)
    assert read_manifest(tmp_path).layout.table_bytes == 800 * 3 * 3 * 128 * 2
    planned = plan(SparseRows(rows, row_ids), tmp_path / "another", dtype="bfloat16")
    assert estimate(planned).table_bytes == sum(path.stat().st_size for path in tmp_path.glob("rows-*"))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("dtype", CODECS)
def test_every_reader_returns_zeros_for_other_ids_and_does_not_read_for_them(
    dtype: str, reader: str, tmp_path: Path
) -> None:
    build(tmp_path / "sparse", dtype, hidden_size=128)
    build_lut(FixedRows(random_rows(hidden_size=128)), tmp_path / "all", dtype=dtype)
    with LutStore.open(tmp_path / "all") as store:
        expected = store.gather(torch.arange(23))
    expected[OTHERS] = 0
    for cache_mb in (0, 0.02, 1):
        with LutStore.open(tmp_path / "sparse", reader=reader, cache_mb=cache_mb) as store:
            started = count_reads(store)
            for ids in (MIXED, IDS, OTHERS, MIXED, torch.tensor([5, 5, 2, 2])):
                assert torch.equal(store.gather(ids), expected[ids])
                out = torch.full((len(ids), store.layout.row_bytes), 7, dtype=torch.uint8)
                store.request(ids, out=out).codes()
                assert torch.equal(store.request(ids).codes(), out)
            assert all(number < 9 for number in started)
            assert store.stats.bytes == len(started) * store.layout.row_bytes
            assert store.stats.cache_hits + store.stats.cache_misses in (0, 3 * (5 + 9 + 5 + 2))


def count_reads(store: LutStore) -> list[int]:
    """Return a list that will hold the number of each row that the store's reader is asked for."""
    reader, started = store.reader, list[int]()
    if isinstance(reader, ResidentTable):
        return started
    start = reader.start

    def counting(wanted: Wanted, rows: Bytes, arrived: Arrived) -> Finish | None:
        started.extend(number for number, _ in wanted)
        return start(wanted, rows, arrived)

    reader.start = counting
    return started


def test_the_cache_is_seeded_with_frequent_ids_that_have_a_row(tmp_path: Path) -> None:
    counts = torch.zeros(23, dtype=torch.int64)
    counts[torch.tensor([12, 22, 21])] = torch.tensor([5, 9, 99])
    expected = build(tmp_path, token_counts=counts)
    with LutStore.open(tmp_path, cache_mb=2.5 * 3 * 3 * 32 * 4 / 2**20) as store:
        assert torch.equal(store.gather(torch.tensor([21, 12, 22])), expected[[21, 12, 22]])
        assert (store.stats.cache_hits, store.stats.cache_misses) == (2, 0)


@pytest.mark.parametrize("bad", [-1, 23])
def test_ids_outside_the_vocabulary_are_refused(bad: int, tmp_path: Path) -> None:
    build(tmp_path)
    with (
        LutStore.open(tmp_path) as store,
        pytest.raises(IndexError, match=rf"token id {bad} is outside .* \[0, 23\)"),
    ):
        store.gather(torch.tensor([bad]))


def test_a_damaged_list_of_ids_is_noticed(tmp_path: Path) -> None:
    build(tmp_path / "lut")
    path = tmp_path / "lut" / ROW_IDS_NAME
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-8] ^= 1  # another last id
    save_file({"row_ids": IDS + 1}, tmp_path / "others")
    for damaged in (bytes(flipped), whole[:-8], (tmp_path / "others").read_bytes(), None):
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        for reader in READERS:
            with pytest.raises(LutFormatError, match=rf"{ROW_IDS_NAME}: missing or not what the manifest lists"):
                LutStore.open(tmp_path / "lut", reader=reader)
        with pytest.raises(LutFormatError, match=ROW_IDS_NAME):
            build_lut(tmp_path / "lut", tmp_path / "again")
        assert [ROW_IDS_NAME in problem for problem in verify_table(tmp_path / "lut")] == [True]


@pytest.mark.parametrize("ids", [[0, 3, 2], [0, 2, 2], [-1, 2, 3], [0, 2, 23]])
def test_a_list_that_is_not_sorted_is_refused_though_its_hash_fits(ids: list[int], tmp_path: Path) -> None:
    source = SparseRows(random_rows(), torch.tensor([0, 2, 3]))
    source.row_ids = torch.tensor(ids)
    build_lut(source, tmp_path, dtype="float32")
    with pytest.raises(LutFormatError, match=r"not in ascending order within \[0, 23\)"):
        LutStore.open(tmp_path)


def test_a_damaged_row_and_a_manifest_of_another_version_are_named(tmp_path: Path) -> None:
    build(tmp_path)
    shard, path = tmp_path / "rows-00001.safetensors", tmp_path / "manifest.json"
    data = bytearray(shard.read_bytes())
    data[4096 + 5] ^= 1
    shard.write_bytes(data)
    for reader in READERS:
        with (
            pytest.raises(LutFormatError, match=r"row 5 is damaged: its CRC-32"),
            LutStore.open(tmp_path, reader=reader) as store,
        ):
            store.gather(IDS)
    assert ["row 5 is damaged" in problem for problem in verify_table(tmp_path)] == [True]
    text = path.read_text()
    for edit in ({"format_version": 3}, {"format_version": 1}, {"sparse_rows": 8}, {"sparse_rows": None}):
        path.write_text(json.dumps({**json.loads(text), **edit}, indent=1) + "\n")
        with pytest.raises(LutFormatError, match=r"manifest\.json: "):
            LutStore.open(tmp_path)
    document = json.loads(text)
    del document["sha256"], document["row_ids_sha256"]
    path.write_text(json.dumps({**document, "sha256": sha256(json.dumps(document, sort_keys=True).encode())}))
    with pytest.raises(LutFormatError, match="row_ids_sha256 is None, expected text"):
        LutStore.open(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "int8", "nf4"])
def test_any_number_of_ranks_and_another_table_give_the_same_bytes(dtype: str, tmp_path: Path) -> None:
    build(tmp_path / "one", dtype)
    options = {"dtype": dtype, "shard_bytes": SHARD_BYTES, "chunk_tokens": 2}
    manifests = build_on_ranks(SparseRows(random_rows()), tmp_path / "many", 2, **options)
    assert manifests == [read_manifest(tmp_path / "one")] * 2
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert verify_table(tmp_path / "one") == []
    build(tmp_path / "exact")
    build_lut(tmp_path / "exact", tmp_path / "recoded", **options)  # pyright: ignore[reportArgumentType]
    recoded, direct = contents(tmp_path / "recoded"), contents(tmp_path / "one")
    assert {name: recoded[name] for name in recoded if name != "manifest.json"} == {
        name: direct[name] for name in direct if name != "manifest.json"
    }


def test_an_interrupted_build_goes_on_and_one_of_other_ids_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "whole")
    encode = builder.encode_chunk

    def failing(*arguments: object) -> object:
        if arguments[1] == 4:
            raise RuntimeError("pulled the plug")
        return encode(*arguments)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="pulled the plug"):
        patched.setattr(builder, "encode_chunk", failing)
        build(tmp_path / "lut")
    with pytest.raises(LutError, match="unfinished"):
        LutStore.open(tmp_path / "lut")
    with pytest.raises(LutError, match="holds an unfinished table of other weights"):
        build_lut(SparseRows(random_rows(), IDS[1:]), tmp_path / "lut", dtype="float32", shard_bytes=SHARD_BYTES)
    build(tmp_path / "lut")
    assert contents(tmp_path / "lut") == contents(tmp_path / "whole")
    build_lut(FixedRows(random_rows()), tmp_path / "lut", dtype="float32", overwrite=True)
    assert not (tmp_path / "lut" / ROW_IDS_NAME).exists()
    assert verify_table(tmp_path / "lut") == []


def test_a_row_that_cannot_be_stored_names_its_id(tmp_path: Path) -> None:
    rows = random_rows()
    rows[11, 1] = torch.nan
    with pytest.raises(LutError, match="layer 1, ids from 11: a row holds NaN"):
        build_lut(SparseRows(rows), tmp_path, dtype="float32", shard_bytes=SHARD_BYTES, chunk_tokens=2)


def test_a_table_without_any_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LutError, match="no id has a row"):
        build_lut(SparseRows(random_rows(), IDS[:0]), tmp_path / "lut")
    assert not (tmp_path / "lut").exists()


def test_neighbors_are_ids_and_an_id_without_a_row_has_none(tmp_path: Path) -> None:
    build(tmp_path)
    found = find_neighbors(tmp_path, 12, layers=[2], neighbors=20)
    assert found.token_ids.shape == (1, 3, 8)
    for expert in range(3):
        vectors = random_rows()[IDS, 2, expert]
        cosines = torch.cosine_similarity(vectors, vectors[5], dim=-1)
        order = [token_id for token_id in IDS[cosines.argsort(descending=True)].tolist() if token_id != 12]
        assert found.token_ids[0, expert].tolist() == order
    with pytest.raises(LutError, match="token id 4 has no row in this table"):
        find_neighbors(tmp_path, 4, layers=[2], neighbors=1)
