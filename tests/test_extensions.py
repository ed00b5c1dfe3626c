"""A codec, a reader and a task from outside the package: an object and a line each, and every verb takes them."""

import json
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from src import evaluate, generate, reparameterize, verify
from src.config import load_config
from src.errors import ConfigError, LutError
from src.evaluation.held_out import HeldOut
from src.evaluation.tasks import TASKS, GeneratedTask, TaskDocument, register_task
from src.lut import LutStore
from src.lut.codecs import CODECS, Codec, register_codec
from src.lut.layout import TableLayout
from src.lut.readers import READERS, Reader, register_reader
from src.lut.readers.reader import Arrived, Bytes, ShardFiles, Wanted
from src.train import RunResult
from tests.conftest import CONFIGS

TABLE = ("--lut", "lut-toy")


class ToyCodec(Codec):
    """One byte a value, in steps of 1/32."""

    def vector_bytes(self, hidden_size: int) -> int:
        return hidden_size

    def encode(self, vectors: Tensor) -> Tensor:
        return (vectors * 32).round().clamp(-127, 127).to(torch.int8).contiguous().view(torch.uint8)

    def decode(self, codes: Tensor, hidden_size: int) -> Tensor:
        return codes.contiguous().view(torch.int8).to(torch.float32) / 32


class ToyReader(Reader):
    """One blocking read after another; counts them."""

    rows_read = 0

    def __init__(self, lut_dir: Path, layout: TableLayout, _device: torch.device) -> None:
        self.files = ShardFiles(lut_dir, layout)

    def start(self, wanted: Wanted, rows: Bytes, arrived: Arrived) -> None:
        for token_id, position in wanted:
            self.files.read_row(token_id, rows[position].data)
            arrived(token_id, position)
            ToyReader.rows_read += 1

    def close(self) -> None:
        self.files.close()


def first_words(text: HeldOut, limit: int) -> list[TaskDocument]:
    return [TaskDocument(text.text[:40], (" import", " zebra"), 0)] * min(limit, 3)


@pytest.fixture(params=[1.0])
def toys(request: pytest.FixtureRequest) -> Generator[None]:
    register_codec(ToyCodec(name="toy8", help="1 byte a value in steps of 1/32", loss_limit=request.param))
    register_reader("toy_reader", "reads one row after another", ToyReader)
    register_task(GeneratedTask("toy_task", "import or zebra?", first_words))
    ToyReader.rows_read = 0
    yield
    del CODECS["toy8"], READERS["toy_reader"], TASKS["toy_task"]


@pytest.fixture(scope="module")
def run(trained: RunResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("extended") / "run"
    shutil.copytree(trained.run_dir, path)
    return path


def reparameterized(run: Path) -> list[str]:
    if not (run / "lut-toy").exists():
        reparameterize.main(["--run", str(run), *TABLE, "--dtype", "toy8"])
    return ["--run", str(run), *TABLE]


@pytest.mark.usefixtures("toys")
def test_every_verb_takes_them_by_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, scores = reparameterized(run), tmp_path / "scores.json"
    manifest = json.loads((run / "lut-toy" / "manifest.json").read_text())
    assert (manifest["precision"], manifest["row_bytes"]) == ("toy8", 2 * 4 * 64)
    evaluate.main(
        [*arguments, "--reader", "toy_reader", "--tasks", "toy_task,toy_task", "--limit", "2", "--json", str(scores)]
    )
    assert ToyReader.rows_read > 0
    tasks = json.loads(scores.read_text())["tasks"]
    assert list(tasks) == ["toy_task"]
    assert tasks["toy_task"]["documents"] == 2
    texts: list[str] = []
    for reader in ("toy_reader", "pread"):
        capsys.readouterr()
        generate.main([*arguments, "--reader", reader, "--experts", "lut", "--prompt", "import os"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("import os")


@pytest.mark.usefixtures("toys")
def test_a_reader_serves_the_library(run: Path) -> None:
    ids = torch.tensor([7, 200, 7])
    with (
        LutStore.open(run / "lut", reader="toy_reader", cache_mb=0.1) as store,
        LutStore.open(run / "lut") as other,
    ):
        assert isinstance(store.reader, ToyReader)
        assert torch.equal(store.gather(ids), other.gather(ids))
        with pytest.raises(IndexError, match="token id 512 is outside"):
            store.request(torch.tensor([512]))
    with pytest.raises(LutError, match=r"reader 'toy' is unknown; choose one of .*\btoy_reader\b"):
        LutStore.open(run / "lut", reader="toy")


def proof(run: Path, tmp_path: Path) -> dict[str, bool | None]:
    try:
        verify.main([*reparameterized(run), "--json", str(tmp_path / "proof.json")])
    finally:
        checks = json.loads((tmp_path / "proof.json").read_text())
    return {check["name"]: check["holds"] for check in checks}


@pytest.mark.usefixtures("toys")
def test_verify_reads_with_the_reader_and_accepts_what_the_codec_may_cost(run: Path, tmp_path: Path) -> None:
    checks = proof(run, tmp_path)
    assert ToyReader.rows_read > 0
    assert "logits through toy_reader" in checks
    assert checks["held-out loss, toy8 table"] is True
    assert checks["rows as toy8, 512 bytes a token"] is True


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("toys", [1e-12], indirect=True)
def test_verify_fails_a_codec_that_costs_more_than_it_may(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as left:
        proof(run, tmp_path)
    assert left.value.code == 1
    failed = [check["name"] for check in json.loads((tmp_path / "proof.json").read_text()) if check["holds"] is False]
    assert failed == ["held-out loss, toy8 table", "rows as toy8, 512 bytes a token"]


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("main", "names"),
    [
        (reparameterize.main, ["toy8 (1 byte a value in steps of 1/32)"]),
        (evaluate.main, ["toy_reader (reads one row after another)", "toy_task import or zebra?"]),
        (generate.main, ["toy_reader (reads one row after another)"]),
    ],
)
def test_help_lists_them(
    main: Callable[[list[str]], None], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(name in printed for name in names)


@pytest.mark.usefixtures("toys")
def test_errors_list_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for main, arguments, name in (
        (reparameterize.main, ["--dtype", "toy9"], "toy8"),
        (evaluate.main, ["--reader", "toy"], "toy_reader"),
        (generate.main, ["--prompt", "a", "--reader", "toy"], "toy_reader"),
    ):
        with pytest.raises(SystemExit):
            main(["--run", str(run), *arguments])
        assert f"'{name}'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"unknown task 'toytask'; did you mean 'toy_task'\? Known: .*toy_task"):
        evaluate.main(["--run", str(run), "--tasks", "toytask"])
    quickstart = CONFIGS / "quickstart.yaml"
    with pytest.raises(ConfigError, match=r"evaluation.tasks: unknown task 'toytask'; did you mean 'toy_task'\?"):
        load_config(quickstart, ["evaluation.tasks=[toytask]"])
    with pytest.raises(ConfigError, match=r"lut.dtype: 'toy', but it must be one of float32, .*, toy8"):
        load_config(quickstart, ["lut.dtype=toy"])
    config = load_config(quickstart, ["evaluation.tasks=[toy_task]", "lut.dtype=toy8"])
    assert (config.evaluation.tasks, config.lut.dtype) == (["toy_task"], "toy8")


@pytest.mark.usefixtures("toys")
def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="a task named 'toy_task' is registered already"):
        register_task(TASKS["toy_task"])
    with pytest.raises(ValueError, match="a codec named 'toy8' is registered already"):
        register_codec(CODECS["toy8"])
    with pytest.raises(ValueError, match="a reader named 'toy_reader' is registered already"):
        register_reader("toy_reader", "", ToyReader)
