"""`DiskExperts`: rows requested ahead or not, packed or not, on the CPU or a GPU, are those of their ids."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from src.inference import load_model
from src.inference.disk_experts import DiskExperts, Staging
from src.lut import LutStore
from src.lut.codecs import CODECS
from tests.inference.runs import prompts, write_run
from tests.lut.tables import write_table

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


class Event:
    """An event of a pretended GPU; its copy is done when a test says so."""

    def __init__(self) -> None:
        self.done = False
        EVENTS.append(self)

    def record(self, _stream: object) -> None: ...

    def query(self) -> bool:
        return self.done


EVENTS: list[Event] = []


class SideStream:
    """A stream of a pretended GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_event(self, _event: Event) -> None: ...


class PretendedCuda:
    """What `Staging` uses of `torch.cuda`, without a GPU."""

    Event = Event

    def __init__(self) -> None:
        self.made, self.current = list[SideStream](), SideStream(torch.device("cuda:0"))

    def Stream(self, device: torch.device) -> SideStream:  # noqa: N802 - torch's name
        self.made.append(SideStream(device))
        return self.made[-1]

    @contextmanager
    def stream(self, stream: SideStream) -> Generator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def current_stream(self, _device: torch.device) -> SideStream:
        return self.current


def copied(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return tensor.clone()


def recorded(_tensor: torch.Tensor, _stream: SideStream) -> None: ...


def test_page_locked_buffers_are_few_and_belong_to_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, allocated, device = PretendedCuda(), list[int](), torch.device("cuda:1")

    def empty(rows: int, row_bytes: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory and cuda.current.device == device
        allocated.append(rows)
        return torch.zeros(rows, row_bytes, dtype=dtype)

    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "to", copied)
    monkeypatch.setattr(torch.Tensor, "record_stream", recorded)
    staging = Staging(16)
    first = staging.take(300, device)
    staging.deliver(first, 300, device)
    assert len(staging.take(300, device)) == 512 and allocated == [512, 512]  # the first is still being copied
    for event in EVENTS:
        event.done = True
    for prompt_tokens in (512, 300, 1, 2, 400):
        for num_rows in (prompt_tokens, 1, 1, 1):
            staging.deliver(staging.take(num_rows, device), num_rows, device)
            EVENTS[-1].done = True
    assert allocated == [512, 512]
    assert [stream.device for stream in cuda.made] == [device]


def test_rows_stay_right_while_later_ones_are_read(tmp_path: Path) -> None:
    write_table(tmp_path)
    with LutStore.open(tmp_path) as store:
        experts = DiskExperts(store)
        kept = [experts.rows(torch.tensor([i]), torch.zeros(1, 128))(1) for i in range(40)]
        for token_id, rows in enumerate(kept):
            assert torch.equal(rows, store.gather(torch.tensor([token_id]))[:, 1])
