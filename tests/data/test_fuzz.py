"""Any bytes under any ending give documents or one clear line."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.data.config import SourceConfig
from src.data.corpus import read_source
from src.data.files import source_files
from src.errors import DataError
from tests.data.corpora import write_as

ENDINGS = [".txt", ".jsonl", ".json", ".parquet", ".txt.gz", ".jsonl.zst", ".json.gz", ".gz", ".zst", ".bz2", ".xz"]
STARTS = st.sampled_from(
    [b"", b"\xef\xbb\xbf", b"[", b'[{"text":', b'{"text":', b"PAR1", b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd"]
)


def read(name: str, raw: bytes) -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(raw)
        source = SourceConfig(files=[f"{folder}/{name}"])
        try:
            list(read_source(source, source_files(source)))
        except DataError as error:
            assert name in str(error)


@pytest.mark.parametrize("ending", ENDINGS)
@settings(max_examples=40, deadline=None)
@given(start=STARTS, rest=st.binary(max_size=300))
def test_arbitrary_bytes_give_documents_or_one_line(ending: str, start: bytes, rest: bytes) -> None:
    read(f"t{ending}", start + rest)


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.jsonl.zst", "t.parquet", "t.json"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), mask=st.integers(1, 255))
def test_a_changed_byte_gives_documents_or_one_line(name: str, place: int, mask: int, tmp_path: Path) -> None:
    raw = bytearray(write_as(name, tmp_path, ["one text", "another\ntext"]).read_bytes())
    raw[place % len(raw)] ^= mask
    read(name, bytes(raw))
