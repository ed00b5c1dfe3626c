"""Tokenizing: the same ids however the work is divided, bounded memory, processes that die; duplicates remembered."""

import os
import random
import signal
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data import text_rule as text_rule_module
from src.data.batches import HashSet
from src.data.encoder import Encoder
from src.data.encoder_pool import encode_in_order
from src.data.text_rule import cut_at_line_ends, training_rule
from src.data.tokenizer import train_bpe
from src.errors import DataError
from tests.data.corpora import sentences

TOKENIZER = train_bpe(iter(sentences(50)), 300)
RULE = training_rule(TOKENIZER, "BPE")
BATCHES = [sentences(5, seed=seed) for seed in range(12)]


def ids_of(batches: Iterator[list[str]], processes: int) -> list[list[int]]:
    encoded = encode_in_order(batches, lambda batch: batch, RULE, processes)
    return [ids.token_ids.tolist() for _, ids in encoded]


def test_ids_are_those_of_the_library_with_separators() -> None:
    encoder = Encoder(RULE)
    encoded = encoder([*sentences(3), ""])
    expected = [[*TOKENIZER.encode(text).ids, 0] for text in [*sentences(3), ""]]
    assert encoded.token_ids.tolist() == [token for ids in expected for token in ids]
    assert encoded.lengths.tolist() == [len(ids) for ids in expected]
    assert encoded.token_ids.dtype == np.uint16
    assert len(encoder([]).token_ids) == 0


def test_long_documents_are_tokenized_in_pieces_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rule_module, "PIECE_CHARACTERS", 64)
    texts = ["".join(sentences(20)), "x" * 500, "short"]
    encoded = Encoder(RULE)(texts)
    documents = np.split(encoded.token_ids, np.cumsum(encoded.lengths)[:-1])
    assert [TOKENIZER.decode(ids[:-1].tolist()) for ids in documents] == texts


@given(text=st.text(alphabet="ab\n", max_size=60), limit=st.integers(1, 10))
def test_pieces_are_the_text_cut_behind_line_ends_where_there_are_any(text: str, limit: int) -> None:
    pieces = cut_at_line_ends(text, limit)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= limit
    assert all(piece.endswith("\n") or "\n" not in piece for piece in pieces[:-1])


def test_processes_give_the_ids_of_one_encoder_in_order() -> None:
    here = [ids for batch in BATCHES for ids in ids_of(iter([batch]), 1)]
    assert ids_of(iter(BATCHES), 2) == here


def test_batches_are_taken_only_as_fast_as_they_are_encoded() -> None:
    taken: list[int] = []

    def batches() -> Iterator[list[str]]:
        for number, batch in enumerate(BATCHES):
            taken.append(number)
            yield batch

    encoded = encode_in_order(batches(), lambda batch: batch, RULE, processes=1)
    for done, _ in enumerate(encoded):
        assert len(taken) - done <= 3
    assert len(taken) == len(BATCHES)


def test_a_process_that_dies_is_one_clear_error_and_leaves_none_behind() -> None:
    before = {child.pid for child in psutil.Process().children()}
    encoded = encode_in_order(BATCHES, lambda batch: batch, RULE, processes=1)
    next(encoded)
    (child,) = {child.pid for child in psutil.Process().children()} - before
    os.kill(child, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a tokenizing process ended with exit code -9; was it killed, or out of mem"):
        list(encoded)
    assert {child.pid for child in psutil.Process().children()} <= before


def test_hashes_are_remembered_while_memory_lasts() -> None:
    generator = random.Random(2)
    values = [0, 2**64 - 1, *(generator.getrandbits(64) for _ in range(60_000))]
    seen = HashSet(memory_mb=1)
    assert seen.max_slots == 65_536
    assert all(seen.add(value) for value in values)
    assert seen.is_full and seen.count == 39_322  # 0.6 of the slots
    remembered = values[: seen.count]
    assert not any(seen.add(value) for value in remembered)
    assert all(seen.add(value) for value in values[seen.count :])


@given(values=st.lists(st.integers(0, 2**64 - 1) | st.integers(2, 9), max_size=300))
def test_a_hash_is_new_once(values: list[int]) -> None:
    seen, expected = HashSet(memory_mb=1), set[int]()
    for value in values:
        assert seen.add(value) == ((value or 1) not in expected)
        expected.add(value or 1)
