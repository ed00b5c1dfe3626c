"""The loss benchmark measures what it says, in a size that takes a second."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from src.benchmarks import loss
from tests.conftest import STDLIB


def test_it_prints_and_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "loss.json"
    corpus = [str(path) for path in sorted((STDLIB / "json").glob("*.py"))]
    sizes = ["--tokens", "64", "--hidden-size", "8", "--vocab-size", "300", "--rounds", "2"]
    loss.main([*sizes, "--corpus", *corpus, "--output", str(written)])
    record = json.loads(written.read_text())
    assert set(record["seconds"]["loss"]) == {loss.OURS, loss.PLAIN, loss.PRODUCTS}
    assert all(len(seconds) == 2 for seconds in record["seconds"]["loss"].values())
    assert [target["limit"] for target in record["targets"]][:2] == [1.0, 1.5]
    assert "over plain" in capsys.readouterr().out
    assert written.with_suffix(".png").is_file()


def test_both_losses_are_one_number_and_run_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[torch.Tensor] = []
    backward = torch.Tensor.backward

    def noted(self: torch.Tensor) -> None:
        backward(self)
        losses.append(self.detach())

    monkeypatch.setattr(torch.Tensor, "backward", noted)
    works = loss.contenders(8, 50, torch.arange(40))
    works[loss.OURS]()
    works[loss.PLAIN]()
    ours, plain = losses
    assert abs(ours - plain) < 1e-3
    assert 0.5 * F.cross_entropy(torch.zeros(1, 50), torch.zeros(1).long()) < plain
