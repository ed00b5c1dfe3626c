"""Paired comparisons, loss by token frequency, further corpora; and `evaluate --compare`."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from src import evaluate, reparameterize
from src.data.config import DataConfig, SourceConfig, TokenizerConfig
from src.data.packed_corpus import prepare_corpus
from src.data.text_rule import TextRule, training_rule
from src.data.tokenizer import train_bpe
from src.errors import UserError
from src.evaluation.comparison import compare
from src.evaluation.held_out import EvaluationCorpus, corpus_windows, windows_by_source
from src.evaluation.perplexity import Band, Score, loss_by_frequency
from src.evaluation.results import Evaluation, TaskScore, TextScore
from src.train import RunResult


def evaluation(losses: list[float], predictions: list[int], *, gap: float = 0.5, documents: str = "d") -> Evaluation:
    score = Score(loss=sum(losses) / len(losses), tokens=10, bytes=20)
    text = TextScore(corpus="held_out", score=score, window_losses=losses, bands=[], fingerprint="w")
    hits = [float(prediction == 1) for prediction in predictions]
    gaps = [gap] * len(predictions)
    task = TaskScore(task="t", values={"acc": hits}, predictions=predictions, gaps=gaps, fingerprint=documents)
    return Evaluation(texts=[text], tasks=[task])


def test_documents_are_paired_and_changed_answers_counted() -> None:
    text, task = compare(evaluation([1.0, 2.0, 3.0], [1, 1, 0]), evaluation([1.5, 2.5, 3.5], [1, 0, 2]))
    assert (text.name, text.metric, text.paired.difference, text.paired.stderr) == ("held_out", "loss", 0.5, 0)
    assert text.changed_predictions is None
    assert (task.name, task.paired.first, task.paired.second) == ("t", pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert (task.changed_predictions, task.near_ties) == (2, 0)
    tied = compare(evaluation([1.0, 2.0], [1, 0], gap=1e-6), evaluation([1.0, 2.0], [0, 0]))[1]
    assert (tied.changed_predictions, tied.near_ties) == (1, 1)


def test_other_documents_are_not_paired() -> None:
    rows = compare(evaluation([1.0], [1]), evaluation([1.0], [1], documents="others"))
    assert [row.name for row in rows] == ["held_out"]


def test_loss_by_frequency_sorts_tokens_by_their_count_in_training() -> None:
    counts = torch.tensor([0, 3, 9, 10, 99, 5000])
    windows = torch.tensor([[5, 0, 1, 2], [0, 3, 4, 5]])
    losses = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 7.0]])
    assert loss_by_frequency(losses, windows[:, 1:], counts) == [
        Band(least=0, most=0, tokens=1, loss=1.0),
        Band(least=1, most=9, tokens=2, loss=3.0),
        Band(least=10, most=99, tokens=2, loss=4.0),
        Band(least=1000, most=9999, tokens=1, loss=7.0),
    ]


@pytest.fixture(scope="module")
def rule() -> TextRule:
    return training_rule(train_bpe(iter(["some words to learn, and some more words"] * 10), 280), "BPE")


def test_a_corpus_is_its_first_windows_with_documents_separated(rule: TextRule, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words to learn " * 4)
    (tmp_path / "b.txt").write_text("and some more words " * 40)
    corpus = EvaluationCorpus(name="two", files=[f"{tmp_path}/*.txt"], windows=3)
    windows = corpus_windows(corpus, rule, 16)
    assert windows.shape == (3, 17)
    assert torch.equal(windows[:-1, -1], windows[1:, 0])
    tokens = torch.cat([windows[0], windows[1, 1:], windows[2, 1:]]).tolist()
    text = (tmp_path / "a.txt").read_text()
    first = rule.encode(text)
    assert tokens[: len(first) + 1] == [*first, rule.separator]


def test_a_corpus_too_small_says_so(rule: TextRule, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some")
    with pytest.raises(UserError, match=r"evaluation.corpora: small has \d+ tokens, less than one window"):
        corpus_windows(EvaluationCorpus(name="small", files=[f"{tmp_path}/a.txt"]), rule, 16)


def test_a_corpus_that_is_not_text_is_not_scored_in_part(rule: TextRule, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n{"text": \n')
    with pytest.raises(UserError, match=r"evaluation.corpora: broken: .*a.jsonl:2: not JSON"):
        corpus_windows(EvaluationCorpus(name="broken", files=[f"{tmp_path}/a.jsonl"]), rule, 16)


@pytest.mark.parametrize("names", [("prose", "prose"), ("held_out",), ("held_out/one",)])
def test_corpora_need_names_of_their_own(names: tuple[str, ...], trained: RunResult) -> None:
    corpora = [option for name in names for option in ("--corpus", f"{name}={json.__path__[0]}/*.py")]
    with pytest.raises(UserError, match=f"evaluation.corpora: {names[0]} .*; give this one a name of its own"):
        evaluate.main(["--run", str(trained.run_dir), *corpora])


def test_sources_of_one_name_are_all_scored(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.txt").write_text("".join(f"words {number} in {folder}\n" for number in range(200)))
    sources = [SourceConfig(files=[f"{tmp_path}/{folder}/*.txt"], document_start="words") for folder in ("a", "b")]
    tokenizer = TokenizerConfig(vocab_size=280)
    data = DataConfig(
        sources=sources, tokenizer=tokenizer, sequence_length=8, validation_fraction=0.5, cache_dir=str(tmp_path / "c")
    )
    assert list(windows_by_source(prepare_corpus(data), 8, 4)) == ["*.txt", "*.txt-2"]


def test_comparing_with_the_table_scores_the_other_form_first(trained: RunResult, tmp_path: Path) -> None:
    options = ["--run", str(trained.run_dir), "--compare", "lut", "--tasks", "", "--json", str(tmp_path / "s.json")]
    evaluate.main(options)
    found = json.loads((tmp_path / "s.json").read_text())
    assert "training form" in found["form"]
    assert "lookup form" in found["compared_with"]
    with pytest.raises(UserError, match="--compare lut: that is what --experts and --lut name already"):
        evaluate.main([*options, "--experts", "lut"])


def test_both_forms_of_a_run_compare_equal(
    trained: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--run", str(trained.run_dir), "--experts", "ffn", "--compare", "lut"]
    evaluate.main([*arguments, "--json", str(tmp_path / "scores.json"), "--corpus", f"json={json.__path__[0]}/*.py"])
    found = json.loads((tmp_path / "scores.json").read_text())
    rows = {(row["name"], row["metric"]): row for row in found["comparison"]}
    assert {name for name, _ in rows} == {"held_out", "json", "next_passage", "repeated_word"}
    for row in rows.values():
        assert abs(row["difference"]) < 1e-4
        assert row["stderr"] < 1e-4
    assert rows["next_passage", "acc"]["test"] == "McNemar"
    assert rows["next_passage", "acc"]["changed_predictions"] == rows["next_passage", "acc"]["near_ties"]
    held_out = found["texts"]["held_out"]
    assert sum(band["tokens"] for band in held_out["bands"]) == held_out["tokens"]
    total = sum(band["tokens"] * band["loss"] for band in held_out["bands"])
    assert total / held_out["tokens"] == pytest.approx(held_out["loss"], rel=1e-6)
    printed = capsys.readouterr().out
    assert "occurrences" in printed
    assert "McNemar" in printed


def test_tables_and_runs_compare_too_and_others_are_named(trained: RunResult, tmp_path: Path) -> None:
    run, other, foreign = tmp_path / "run", tmp_path / "other", tmp_path / "foreign"
    for copy in (run, other, foreign):
        shutil.copytree(trained.run_dir, copy)
    reparameterize.main(["--run", str(run), "--dtype", "int8", "--lut", "lut-int8"])
    train_bpe(iter(["other words"] * 9), 290).save(str(foreign / "tokenizer.json"))
    options = ["--tasks", "next_passage", "--limit", "8", "--json", str(tmp_path / "scores.json")]
    for compared, name in (("lut-int8", "run (lookup form, lut-int8)"), (str(other), "other (lookup form, lut)")):
        evaluate.main(["--run", str(run), "--compare", compared, *options])
        found = json.loads((tmp_path / "scores.json").read_text())
        assert found["compared_with"] == name
        assert [row["documents"] for row in found["comparison"]] == [64, 8, 8]
        assert (found["comparison"][0]["difference"] == 0) == (compared == str(other))
    with pytest.raises(UserError, match=r"--compare lut-nf9: neither a run directory nor a table .* lut, lut-int8"):
        evaluate.main(["--run", str(run), "--compare", "lut-nf9"])
    with pytest.raises(UserError, match=r"its tokenizer \([0-9a-f]+\) is not that of .*run \([0-9a-f]+\)"):
        evaluate.main(["--run", str(run), "--compare", str(foreign)])
