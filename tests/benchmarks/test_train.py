"""The training benchmark measures what it says, in a size that takes seconds."""

import json
from pathlib import Path

import pytest
import torch

from src.accounting.flops import count_computed_ids, step_flops
from src.benchmarks import train
from src.errors import UserError
from src.model import ModelConfig
from tests.conftest import STDLIB

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    intermediate_size=32,
    num_experts=3,
    expert_intermediate_size=24,
    expert_execution="per_token",
)


def arguments(cache_dir: Path, *more: str) -> list[str]:
    sizes = [
        "--shape",
        "small",
        "--layers",
        "1",
        "--experts",
        "2",
        "--windows",
        "2",
        "--sequence-length",
        "32",
        "--rounds",
        "1",
    ]
    return [*sizes, "--vocab-size", "300", "--cache-dir", str(cache_dir), *more]


def test_it_prints_and_writes_what_it_measured(
    tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [f"{STDLIB}/json/*.py", f"{STDLIB}/email/*.py"]
    written, plot = tmp_path / "train.json", tmp_path / "train.png"
    train.main(arguments(cache_dir, "--files", *files, "--json", str(written), "--plot", str(plot)))
    record = json.loads(written.read_text())
    names = [result["name"] for result in record["one_micro_batch"]["results"]]
    assert names == ["Dense", "MoE-6E", "MoLE-2E per_token", "MoLE-2E unique"]
    assert record["one_micro_batch"]["results"][0]["against_baseline"] == 1
    assert all(result["tokens_per_second"] > 0 for result in record["one_micro_batch"]["results"])
    assert [point["tokens"] for point in record["sweep"]] == [32, 64]
    assert record["accumulated"]["unique_against_unique_per_step"] > 0
    assert {"processor", "cores", "torch"} <= set(record["machine"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "distinct ids" in printed
    assert "vocabulary 300" in printed


def test_a_repeated_token_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    for index in range(20):
        (tmp_path / f"{index}.txt").write_text("a" * (4000 + index))
    with pytest.raises(UserError, match="repeated token"):
        train.main(arguments(cache_dir, "--files", f"{tmp_path}/*.txt", "--vocab-size", "257"))


def test_executed_flops_count_experts_as_often_as_they_run() -> None:
    token_ids = torch.tensor([[[1, 2, 1, 2], [3, 1, 2, 3]], [[1, 1, 1, 1], [4, 4, 4, 4]]])  # (A, B, T)
    flops: dict[str, float] = {}
    for execution in ("per_token", "unique", "unique_per_step"):
        config = ModelConfig(**{**CONFIG.to_dict(), "expert_execution": execution})  # type: ignore[arg-type]
        flops[execution] = step_flops(config, token_ids.shape, count_computed_ids(config, token_ids))
    once = 3 * 2 * 4 * 16 * 24 * 3  # forward and backward, layers, two products, widths, experts: of one id
    assert flops["per_token"] - flops["unique"] == pytest.approx(once * (16 - 5), rel=1e-6)
    assert flops["unique"] - flops["unique_per_step"] == pytest.approx(once * (5 - 4), rel=1e-6)
