"""Generation and tables on a GPU: the text and the bytes of the CPU, and one wait for the device a token."""

from functools import partial
from pathlib import Path

import pytest
import torch

from src.benchmarks.common import count_waits
from src.inference import generate, load_model
from src.inference.generation import Options, stream
from src.lut import LutStore, build_lut
from src.lut.codecs import CODECS
from src.lut.sources import RunRows
from src.model.config import Activation
from src.run_directory import RunDirectory
from tests.gpu.devices import devices
from tests.inference.runs import prompts, write_run
from tests.model import test_grouped


@devices()
@pytest.mark.parametrize("reader", ["auto", "memmap", "memory"])
def test_a_table_writes_the_text_of_the_training_form(device: str, reader: str, tmp_path: Path) -> None:
    run, token_ids = write_run(tmp_path), prompts(3, 20).to(device)
    with load_model(run, experts="ffn", device=device) as model:
        expected = generate(model, token_ids, max_new_tokens=30)
    with load_model(run, experts="lut", device=device, reader=reader) as model:
        for _ in range(3):
            assert torch.equal(generate(model, token_ids, max_new_tokens=30), expected)


@devices()
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("options", [Options(), Options(temperature=0.8, top_k=9, top_p=0.9, seed=0)])
def test_a_decoded_token_waits_for_the_device_once(device: str, batch: int, options: Options, tmp_path: Path) -> None:
    with load_model(write_run(tmp_path, dtype="bfloat16"), device=device, dtype=torch.bfloat16) as model:
        steps = stream(model, prompts(batch, 9), max_new_tokens=8, **options)
        next(steps)
        next(steps)  # kernels are loaded by the first
        waits = [count_waits(partial(next, steps), torch.device(device)) for _ in range(5)]
    assert all(count is None or count <= 1 for count in waits), waits
    assert (waits == [None] * 5) == (device == "cpu")


@devices()
@pytest.mark.parametrize("dtype", CODECS)
def test_rows_are_decoded_to_the_same_bits(device: str, dtype: str) -> None:
    codec, rows = CODECS[dtype], torch.randn(40, 3, 256, generator=torch.Generator().manual_seed(0))
    codes = codec.encode(rows)
    decoded = codec.decode(codes, 256)
    assert torch.equal(codec.decode(codes.to(device), 256).cpu(), decoded)
    encoded = codec.encode(rows.to(device)).cpu()
    assert (encoded != codes).float().mean() < 1e-3  # a value between two levels may be rounded to either
    assert ((codec.decode(encoded, 256) - decoded).norm() / decoded.norm()) < 1e-2


@devices()
def test_a_table_computed_there_is_that_of_the_cpu(device: str, tmp_path: Path) -> None:
    run = RunDirectory(write_run(tmp_path / "run"))
    build_lut(RunRows(run, device=device), tmp_path / "lut", dtype="float32")
    with LutStore.open(tmp_path / "lut") as found, LutStore.open(run.lut_path()) as expected:
        ids = torch.arange(97)
        torch.testing.assert_close(found.gather(ids), expected.gather(ids), rtol=1e-5, atol=1e-6)


@devices()
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_grouped_products_are_those_of_the_loop(device: str, activation: Activation) -> None:
    test_grouped.require_the_same(64, 128, torch.bfloat16, activation, device)
