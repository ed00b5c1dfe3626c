"""`DiskExperts`: rows requested ahead or not, packed or not, on the CPU or a GPU, are those of their ids."""

from pathlib import Path

import pytest
import torch
from torch import nn

from src.inference import generate, load_model
from src.inference.disk_experts import DiskExperts, Staging
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


def test_rows_requested_ahead_are_read_once_and_waited_for_by_the_first_mixture(tmp_path: Path) -> None:
    with load_model(write_run(tmp_path), experts="lut") as model, torch.inference_mode():
        token_ids, log = prompts(2, 5), list[str]()
        assert isinstance(model.experts, DiskExperts)
        expected, store = model(token_ids), model.experts.store
        before, rows = store.stats.requests, model.expert_rows(token_ids)
        assert rows is not None and rows.awaited

        def waiting(layer: int) -> torch.Tensor:
            log.append(f"rows {layer}")
            return rows.layer_rows(layer)

        def routed(_module: nn.Module, _inputs: object, _output: object) -> None:
            log.append(f"router {sum(entry.startswith('router') for entry in log)}")

        for block in model.blocks:
            block.get_submodule("router").register_forward_hook(routed)
        trunk = model.trunk(token_ids, expert_rows=rows._replace(layer_rows=waiting))
        assert torch.equal(model.head(trunk.hidden_states), expected)
        assert store.stats.requests == before + 1
        assert log == [f"{what} {layer}" for layer in range(3) for what in ("router", "rows")]


def test_a_staging_buffer_keeps_its_size() -> None:
    staging, device = Staging(16), torch.device("cpu")
    large = staging.take(512, device)
    assert torch.equal(staging.deliver(large, 1, device), large[:1])
    assert staging.take(500, device).data_ptr() == large.data_ptr()


def test_rows_stay_right_while_later_ones_are_read(tmp_path: Path) -> None:
    write_table(tmp_path)
    with LutStore.open(tmp_path) as store:
        experts = DiskExperts(store)
        kept = [experts.rows(torch.tensor([i]), torch.zeros(1, 128))(1) for i in range(40)]
        for token_id, rows in enumerate(kept):
            assert torch.equal(rows, store.gather(torch.tensor([token_id]))[:, 1])


@cuda
@pytest.mark.parametrize("reader", ["auto", "memmap", "memory"])
def test_a_gpu_writes_the_text_of_the_training_form(tmp_path: Path, reader: str) -> None:
    run, token_ids = write_run(tmp_path), prompts(3, 20).cuda()
    with load_model(run, experts="ffn", device="cuda") as model:
        expected = generate(model, token_ids, max_new_tokens=30)
    with load_model(run, experts="lut", device="cuda", reader=reader) as model:
        for _ in range(3):
            assert torch.equal(generate(model, token_ids, max_new_tokens=30), expected)
    assert CONFIG.max_sequence_length >= 50
