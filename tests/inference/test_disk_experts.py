"""`DiskExperts`: prefetched or not, packed or not, on the CPU or a GPU, the rows are those of the ids asked for."""

from pathlib import Path

import pytest
import torch

from src.inference import generate, load_model
from src.inference.disk_experts import DiskExperts
from src.lut import LutStore
from src.lut.codecs import CODECS
from tests.inference.runs import CONFIG, prompts, write_run
from tests.lut.tables import write_table

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LAYERS = range(2)


@pytest.mark.parametrize("dtype", CODECS)
def test_layers_are_those_of_the_whole_row(tmp_path: Path, dtype: str) -> None:
    write_table(tmp_path, dtype=dtype)
    with LutStore.open(tmp_path) as store:
        experts, ids = DiskExperts(store), torch.tensor([3, 70, 299])
        layer_rows = experts.rows(ids, torch.zeros(3, 128))
        for layer in LAYERS:
            assert torch.equal(layer_rows(layer), store.gather(ids)[:, layer])


def test_a_prefetch_is_used_once_and_only_for_its_ids(tmp_path: Path) -> None:
    write_table(tmp_path)
    with LutStore.open(tmp_path) as store:
        experts = DiskExperts(store)
        first, second, other = torch.tensor([1, 2]), torch.tensor([9]), torch.tensor([5, 6])
        experts.prefetch(first)
        experts.prefetch(second)
        embeddings = torch.zeros(2, 128)
        for ids in (first, other, second):
            assert torch.equal(experts.rows(ids, embeddings)(0), store.gather(ids)[:, 0])
        requests = store.stats.requests
        experts.rows(first, embeddings)(0)  # its prefetch is spent
        assert store.stats.requests == requests + 1


def test_rows_stay_right_while_later_ones_are_read(tmp_path: Path) -> None:
    write_table(tmp_path)
    with LutStore.open(tmp_path) as store:
        experts = DiskExperts(store)
        kept = [experts.rows(torch.tensor([i]), torch.zeros(1, 128))(1) for i in range(40)]
        for token_id, rows in enumerate(kept):
            assert torch.equal(rows, store.gather(torch.tensor([token_id]))[:, 1])


@cuda
@pytest.mark.parametrize("reader", ["auto", "direct", "memory"])
def test_a_gpu_writes_the_text_of_the_training_form(tmp_path: Path, reader: str) -> None:
    run, token_ids = write_run(tmp_path), prompts(3, 20).cuda()
    with load_model(run, experts="ffn", device="cuda") as model:
        expected = generate(model, token_ids, max_new_tokens=30)
    with load_model(run, experts="lut", device="cuda", reader=reader) as model:
        for _ in range(3):
            assert torch.equal(generate(model, token_ids, max_new_tokens=30), expected)
    assert CONFIG.max_sequence_length >= 50
