"""Tables of the verbs, as a terminal of 80 columns or a pipe gets them: cells wrap, and nothing is cut off."""

import math
from pathlib import Path

import pytest
from rich.console import Console

from src.accounting import account, print_account
from src.config import load_config
from src.evaluation.comparison import print_comparison, print_evaluation
from src.evaluation.perplexity import Band, Score
from src.evaluation.proof import Check
from src.evaluation.report import Report, TableFacts, print_report
from src.evaluation.results import Evaluation, TaskScore, TextScore
from src.inspect_lut import print_entries
from src.prepare_data import SourceReport, print_sources
from src.verify import print_checks
from tests.conftest import CONFIGS

TASKS = ("next_passage", "repeated_word", "arc_challenge", "lambada_openai")
CORPUS = "held_out/a-source-with-a-long-name-of-its-own.jsonl.gz"


@pytest.fixture
def console() -> Console:
    return Console(width=80, record=True, force_terminal=False)


def printed(console: Console) -> str:
    text = console.export_text()
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith("  python"))  # to copy
    return text


def evaluation(predictions: list[int]) -> Evaluation:
    score = Score(loss=4.1668, tokens=123_456_789, bytes=300_000_000)
    bands = [Band(least=100_000, most=999_999, tokens=12_345_678, loss=3.2)]
    texts = [
        TextScore(corpus=name, score=score, window_losses=[4.1, 4.2], bands=bands, fingerprint=name)
        for name in ("held_out", CORPUS)
    ]
    hits = [float(prediction == 1) for prediction in predictions]
    tasks = [
        TaskScore(
            task=name,
            values={"acc": hits, "acc_norm": hits, "log_likelihood": [-165.4 - hit for hit in hits]},
            predictions=predictions,
            gaps=[1e-6] * len(predictions),
            fingerprint=name,
        )
        for name in TASKS
    ]
    return Evaluation(texts=texts, tasks=tasks)


def report(predictions: list[int]) -> Report:
    return Report(
        steps=100_000,
        trained_tokens=12_345_678_901,
        initial=Score(loss=math.log(50_257), tokens=100, bytes=300),
        training_evaluation=evaluation([1, 0] * 500),
        lookup_evaluation=evaluation(predictions),
        zlib_bits_per_byte=2.442,
        table=TableFacts(directory="lut", precision="bfloat16", table_bytes=2**40, bytes_per_token=2**20),
        training_form_bytes=2**40,
        lookup_form_bytes=2**38,
        sample=None,
    )


def test_the_report_names_every_task(console: Console) -> None:
    print_report(report([1, 1] * 12 + [1, 0] * 488), console, Path("runs/quickstart"))
    text = printed(console)
    assert all(text.count(name) == 3 for name in TASKS)  # acc, acc_norm and log-likelihood, each in one piece
    assert "12/1000 (12)" in text
    assert "python -m src.generate --run runs/quickstart" in text


def test_an_evaluation_and_a_comparison_name_everything(console: Console) -> None:
    print_evaluation(evaluation([1, 0]), "quickstart (lookup form, lut)", console)
    print_comparison(report([1, 1] * 12 + [1, 0] * 488).comparison(), "one", "other", console)
    text = printed(console)
    assert all(text.count(name) == 6 for name in TASKS)
    assert "a-source-with-" in text
    assert "100,000-999,999" in text


def test_a_proof_and_its_precisions_are_whole(console: Console) -> None:
    checks = [
        Check(
            name=name,
            found=found,
            expected="every file, header and row as the manifest says",
            holds=holds,
            values={},
        )
        for name, found, holds in (
            ("table is what was written", f"runs/{'long-' * 20}/lut/s.safetensors: damaged", False),
            ("rows as bfloat16, 1,073,741,824 bytes a token", "loss +1.0e-03, logits max 1.0e-01 mean 1.0e-02", True),
            ("rows as nf4, 1,073,741,824 bytes a token", "loss +1.0e-03, same choice 99.99%", None),
        )
    ]
    print_checks(checks, "runs/quickstart / lut", console)
    text = printed(console)
    assert "FAILS" in text
    assert "".join(line[31:55].strip() for line in text.splitlines()).count("long-") == 20
    assert "bfloat16," in text


def test_sources_tokens_and_costs_are_whole(console: Console) -> None:
    source = SourceReport(
        name="a-source-with-a-long-name-of-its-own/*.jsonl.gz",
        documents=123_456_789,
        held_out_documents=1_234_567,
        tokens=12_345_678_901,
        bytes_per_token=3.123,
        unique_ids_per_16k=3_150,
        duplicates=1_234_567,
        unremembered=123_456,
        skipped={"empty": 12_345, "not JSON": 1},
        examples={},
        path="data",
    )
    print_sources([source], console)
    neighbors = [{"id": number, "text": repr(" internationalization"), "cosine": 0.5} for number in range(5)]
    entry: dict[str, object] = {"layer": 11, "expert": 15, "norm": 12.345, "router_share": 0.5, "neighbors": neighbors}
    print_entries([entry], "token ' the' (id 262), 1,234,567 times in held-out text", console)
    model = load_config(CONFIGS / "paper" / "160m-mole-4e.yaml").model
    costs = account(model, sequence_length=2048, micro_batch_size=8, precision="bf16-mixed", micro_batches=64)
    print_account(costs, console)
    text = printed(console)
    assert text.count("internationalization") == 5
    assert "not JSON" in text
