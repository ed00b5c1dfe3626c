"""The latency figure: measured on a small shape, drawn from its JSON, part by part."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from PIL import Image
from rich.console import Console

from src.benchmarks import figure
from src.benchmarks.common import median_interval, model_config
from src.benchmarks.decode import COLD, IN_MEMORY, MATMULS
from src.benchmarks.figure import PAPER, RESULT, STYLES, announce, disk_bytes, main, medians, read_parts
from src.benchmarks.moe import FEW, MEMORY, RECENT, RECORDED
from src.errors import UserError
from src.model import ModelConfig
from tests.benchmarks.test_offload import MOLE, Ids, small_text
from tests.benchmarks.traces import trace_of

__all__ = ["small_text"]


def tiny(_shape: str) -> ModelConfig:
    return replace(MOLE, num_layers=2)


def free(free_bytes: float) -> Callable[[Path], float]:
    """A disk with so many bytes free."""

    def answer(_path: Path) -> float:
        return free_bytes

    return answer


def text_of(text: Ids) -> Callable[..., Ids]:
    def load(*_args: object) -> Ids:
        return text

    return load


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, small_text: Ids) -> None:
    """The program as it is, but for the size of its models and the text."""
    monkeypatch.setattr(figure, "model_config", tiny)
    monkeypatch.setattr(figure, "load_text_ids", text_of(small_text))


@pytest.mark.usefixtures("small")
def test_a_shape_is_measured_and_another_is_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, trace = tmp_path / "latency.json", tmp_path / "trace.npz"
    trace_of([[(number % 10, (number + 1) % 10)] for number in range(40)]).save(trace)
    common = ["--batches", "1", "2", "--rounds", "3", "--directory", str(tmp_path), "--output", str(output)]
    main(["--shape", "160m-4e", "--routing", str(trace), *common])
    first = read_parts(output)
    assert set(first) == {"160m-4e"}
    part = first["160m-4e"]
    assert part["routing"] == {"model": "by hand"}
    assert set(part["seconds"]) == {"1", "2"}
    assert set(part["seconds"]["2"]) >= {*STYLES, MATMULS}
    assert all(len(found) == 3 for found in part["seconds"]["1"].values())
    assert set(part["offloaded"]["1"]) == {f"{name}, cold{kind}" for name in (FEW, RECENT) for kind in ("", RECORDED)}
    main(["--shape", "410m-4e", *common])
    assert set(read_parts(output)) == {"160m-4e", "410m-4e"}
    assert read_parts(output)["160m-4e"] == part
    printed = capsys.readouterr().out
    assert "GB are free" in printed and "over disk, cold: " in printed
    with Image.open(output.with_suffix(".png")) as drawn:
        assert json.loads(drawn.info["Description"]) == medians(read_parts(output))
        before = drawn.size
    main(["--draw", "--output", str(output)])
    with Image.open(output.with_suffix(".png")) as again:
        assert again.size == before
    assert not list(tmp_path.glob("benchmark-*"))


@pytest.mark.usefixtures("small")
def test_parameters_in_memory_are_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "latency.json"
    common = ["--shape", "160m-4e", "--batches", "1", "--rounds", "1", "--directory", str(tmp_path)]
    main([*common, "--output", str(output)])
    found = read_parts(output)["160m-4e"]["parameters_in_memory"]
    hidden, layers, vocabulary, width = MOLE.hidden_size, 2, MOLE.vocab_size, MOLE.intermediate_size
    rest = 2 * vocabulary * hidden + hidden + layers * (4 * hidden**2 + 2 * hidden)
    dense = rest + layers * 2 * hidden * width
    expert = 2 * hidden * width // 2
    assert found["dense"] == dense
    assert found[COLD] == dense + layers * 4 * hidden
    assert found[IN_MEMORY] == found[COLD] + vocabulary * layers * 4 * hidden
    backbone = rest + layers * 10 * hidden
    assert found[MEMORY] == backbone + layers * 10 * expert
    assert found[f"{FEW}, cold"] == backbone + layers * 2 * expert
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5.1e9, total=2**34))
    main([*common, "--output", str(output)])
    part = read_parts(output)["160m-4e"]
    assert IN_MEMORY in part["left_out"] and IN_MEMORY not in part["seconds"]["1"]
    assert IN_MEMORY not in medians({"160m-4e": part})["160m-4e"]


def test_the_disk_is_named_and_must_be_large_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert round(sum(map(disk_bytes, PAPER)) / 1e9) == 36
    monkeypatch.setattr(figure, "free_bytes", free(20e9))
    with (console := Console(width=300)).capture() as printed:
        announce(PAPER, tmp_path, console)
    assert "writes 35." in printed.get() and "20.0 GB are free" in printed.get()
    monkeypatch.setattr(figure, "free_bytes", free(10e9))
    with pytest.raises(UserError, match=r"GB are needed, but 10\.0 GB are free; .+ --shape"):
        announce(PAPER, tmp_path, console)
    announce(["160m-4e"], tmp_path, console)
    assert figure.TableLayout.of(model_config("160m-16e"), "bfloat16").table_bytes + figure.SPARE_BYTES > 19.9e9


def test_what_is_no_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "[]", '{"shapes": 3}', '{"shapes": {"160m-4e": {}}}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(UserError, match=r"other\.json: no result of this program"):
            main(["--output", str(tmp_path / "other.json"), "--draw"])
    with pytest.raises(UserError, match=r"--draw: .+ holds no shape yet"):
        main(["--output", str(tmp_path / "none.json"), "--draw"])
    for flags in (["--shape", "160m"], ["--rounds", "0"], ["--routing", str(tmp_path / "no.npz")]):
        with pytest.raises(SystemExit, match="2"):
            main(flags)
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.skipif(not RESULT.is_file(), reason="not measured yet")
def test_the_kept_figure_shows_the_kept_numbers() -> None:
    with Image.open(RESULT.with_suffix(".png")) as drawn:
        described: Any = json.loads(drawn.info["Description"])
    assert described == medians(read_parts(RESULT)), "run `python -m src.benchmarks.figure --draw`"


def test_the_interval_of_a_median_is_of_order_statistics() -> None:
    assert median_interval(range(1, 16)) == (4, 12)  # of 15 values, as in tables of the sign test
    assert median_interval(range(1, 41)) == (14, 27)
    assert median_interval([1.0, 2.0, 3.0]) == (1.0, 3.0)
    assert median_interval([5.0]) == (5.0, 5.0)
