"""The document mask, against a plain loop."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from src.data.document_mask import document_mask, segment_ids


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
