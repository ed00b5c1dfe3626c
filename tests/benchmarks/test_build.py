"""The build benchmark, on a table of kilobytes."""

import json
from pathlib import Path

import pytest

from src.benchmarks import build, common
from src.model import ModelConfig


@pytest.mark.parametrize("source", ["run", "model"])
def test_it_prints_both_limits_and_leaves_nothing(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ModelConfig(vocab_size=300, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=128)
    monkeypatch.setattr(common, "dense_config", {"small": small}.__getitem__)
    monkeypatch.setattr(build, "_WRITE_BYTES", 2**20)
    monkeypatch.setattr(build, "_WRITE_PIECE_BYTES", 2**18)
    place, report = tmp_path / "place", tmp_path / "build.json"
    build.main(["--directory", str(place), "--from", source, "--json", str(report)])
    assert not list(place.iterdir())
    figures = json.loads(report.read_text())
    assert figures["table_bytes"] == 4096 + 300 * (1 * 4 * 32 * 2 + 4)
    assert figures["needed_flops"] == 300 * 4 * (4 * 32 * 128)
    slower = min(figures["matmul_limit"], figures["write_bytes_per_second"])
    assert figures["ratio"] == pytest.approx(figures["bytes_per_second"] / slower)
    printed = capsys.readouterr().out
    assert "matrix products allow" in printed
    assert "sequential writes allow" in printed
