"""The benchmarks measure what they say: distinct ids of real text, paired ratios, and every contender runs."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from src.benchmarks import decode, lookup
from src.benchmarks.common import Target, Timings, run_rounds
from src.benchmarks.workload import TextIds, require_distinct
from src.data.tokenizer import train_bpe
from src.errors import DataError

TEXT = "\n".join(f"def area_{word}(width, height): return {word} * width + height" for word in range(3000))


@pytest.fixture(scope="module")
def text() -> TextIds:
    return TextIds(train_bpe(iter([TEXT]), 1000), [TEXT], 50304)


def test_ids_come_from_held_out_text_and_never_repeat(text: TextIds) -> None:
    for count in (1, 8, 60):
        ids = text.distinct(count)
        assert len(ids.unique()) == count
        assert torch.isin(ids, text.held_out).all()
    assert int(text.counts.sum()) > 5 * len(text.held_out)
    with pytest.raises(DataError, match="fewer than 5000 distinct tokens"):
        text.distinct(5000)
    with pytest.raises(DataError, match="repeats a token"):
        require_distinct(torch.tensor([3, 4, 3]))


def test_windows_follow_one_another_and_start_again_at_the_end(text: TextIds) -> None:
    length = len(text.held_out) // 2
    text.window(length)
    text.window(length)
    assert torch.equal(text.window(length), text.held_out[:length])
    with pytest.raises(DataError, match="give more"):
        text.window(len(text.held_out) + 1)


def test_ratios_are_taken_within_a_round() -> None:
    timings = run_rounds(
        {"one": lambda number: 2.0 + number, "other": lambda number: 1.0 + number / 2}, 5, lambda _: None
    )
    assert timings.ratio("one", "other") == 2
    assert timings.difference("one", "other") == 2  # of the middle round: 4 - 2
    assert timings.percentile("one", 99) == 6
    assert isinstance(timings, Timings)


def test_a_target_says_whether_it_holds() -> None:
    assert Target("speed", 0.96, 0.95, at_least=True).line() == "holds  speed: 0.96 >= 0.95"
    assert Target("cost", 1.3, 1.2).line() == "MISSED  cost: 1.3 <= 1.2"


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.parametrize(("main", "more"), [(lookup.main, ()), (decode.main, ("--batches", "1", "2"))])
def test_a_small_run_prints_and_writes_every_figure(
    tmp_path: Path, main: Callable[[Sequence[str]], None], more: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures.json"
    main(["--shape", "small-4e", "--rounds", "2", "--directory", str(tmp_path), "--output", str(output), *more])
    document = json.loads(output.read_text())
    assert document["machine"]["cores"]
    assert document["disk_read_bytes"] > 0
    assert len(document["targets"]) >= 7
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "cold" in capsys.readouterr().out
    assert not list(tmp_path.glob("benchmark-*"))
