"""The document mask: against a plain loop, in the model, and in training."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.model import ModelConfig, Transformer
from src.model.attention import document_mask, segment_ids
from src.train import train
from tests.conftest import small_config
from tests.data.corpora import sentences, write_as


def test_a_separator_belongs_to_the_document_that_it_ends() -> None:
    window = torch.tensor([[5, 6, 0, 7, 0, 0, 8]])
    assert segment_ids(window, separator_id=0).tolist() == [[0, 0, 0, 1, 1, 2, 3]]


@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=9, max_size=9), min_size=1, max_size=3))
def test_positions_see_their_document_alone(rows: list[list[int]]) -> None:
    mask = document_mask(torch.tensor(rows), separator_id=0)
    for row, seen in zip(rows, mask.tolist(), strict=True):
        for query in range(9):
            for key in range(9):
                first, last = sorted((query, key))
                assert seen[query][key] == (0 not in row[first:last])


@pytest.mark.parametrize("execution", ["unique", "per_token"])
def test_a_packed_window_gives_each_document_what_it_gets_alone(execution: Literal["unique", "per_token"]) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=20,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=32,
        num_experts=2,
        expert_intermediate_size=16,
        max_sequence_length=32,
        expert_execution=execution,
    )
    model = Transformer(config).double()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5)
    documents = [[5, 6, 7, 0], [8, 0], [5, 5, 9, 10, 0]]
    packed = torch.tensor([[token for document in documents for token in document]])
    logits = model(packed, attention_mask=document_mask(packed, separator_id=0))
    alone = torch.cat([model(torch.tensor([document])) for document in documents], dim=1)
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-12)
    assert not torch.allclose(model(packed), alone)


def test_training_keeps_documents_apart_when_asked(tmp_path: Path, small_overrides: Sequence[str]) -> None:
    files = f"data.files=[{write_as('short.jsonl', tmp_path, sentences(300))}]"
    few = ("trainer.max_steps=1", "trainer.val_check_interval=1", "trainer.log_every_n_steps=1")
    only = ("evaluation.at_fit_end=false", "lut.at_fit_end=false", "trainer.precision=32-true", files, *few)
    losses: dict[str, list[str]] = {"train/loss": [], "val/loss": []}
    for mask in ("true", "false"):
        run = train(small_config(small_overrides, tmp_path, *only, f"data.document_mask={mask}")).run_dir
        rows = list(csv.DictReader((run / "metrics.csv").open()))
        for name, found in losses.items():
            found += [row[name] for row in rows if row.get(name)]
    assert [len(set(found)) for found in losses.values()] == [2, 2]
