"""What is defined outside `src/` and registered in one line serves every verb by its name."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from src import evaluate, generate, verify
from src.errors import LutError
from src.lut import LutStore
from src.lut.layout import TableLayout
from src.lut.readers import READERS, Reader, register_reader
from src.lut.readers.reader import Arrived, Bytes, ShardFiles, Wanted
from src.train import RunResult


class PlainReader(Reader):
    """The least that a reader can be: one blocking read after another."""

    rows_read = 0

    def __init__(self, lut_dir: Path, layout: TableLayout, _device: torch.device) -> None:
        self.files = ShardFiles(lut_dir, layout)

    def start(self, wanted: Wanted, rows: Bytes, arrived: Arrived) -> None:
        for token_id, position in wanted:
            self.files.read_row(token_id, rows[position].data)
            arrived(token_id, position)
        PlainReader.rows_read += len(wanted)

    def close(self) -> None:
        self.files.close()


@pytest.fixture
def plain() -> Iterator[str]:
    register_reader("plain", "one read after another", PlainReader)
    yield "plain"
    del READERS["plain"]


def test_a_reader_serves_the_library(plain: str, trained: RunResult) -> None:
    ids = torch.tensor([7, 200, 7])
    with (
        LutStore.open(trained.run_dir / "lut", reader=plain, cache_mb=0.1) as store,
        LutStore.open(trained.run_dir / "lut") as other,
    ):
        assert isinstance(store.reader, PlainReader)
        assert torch.equal(store.gather(ids), other.gather(ids))
        with pytest.raises(IndexError, match="token id 512 is outside"):
            store.request(torch.tensor([512]))
    with pytest.raises(LutError, match=r"reader 'plane' is unknown; choose one of .*\bplain\b"):
        LutStore.open(trained.run_dir / "lut", reader="plane")


def test_a_reader_serves_the_verbs(
    plain: str, trained: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--run", str(trained.run_dir)]
    prompt = [*run, "--prompt", "import", "--max-new-tokens", "8"]
    generate.main([*prompt, "--experts", "lut"])
    expected, before = capsys.readouterr().out, PlainReader.rows_read
    generate.main([*prompt, "--reader", plain])
    assert capsys.readouterr().out == expected
    assert PlainReader.rows_read > before
    verify.main([*run, "--json", str(tmp_path / "checks.json")])
    assert "logits through plain" in (tmp_path / "checks.json").read_text()
    for main in (generate.main, evaluate.main):
        with pytest.raises(SystemExit) as stopped:
            main(["--help"])
        assert stopped.value.code == 0
        assert "plain (one read after another)" in " ".join(capsys.readouterr().out.split())
        with pytest.raises(SystemExit) as stopped:
            main([*prompt[:2], "--reader", "plane"])
        assert stopped.value.code == 2
        assert "'plain'" in capsys.readouterr().err
