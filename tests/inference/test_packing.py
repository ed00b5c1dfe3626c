"""Packed weights: the bits of plain ones, in a model that copies, saves and converts as a plain one does."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.benchmarks.common import dense_config
from src.inference import InferenceModel, generate, load_model
from src.model import Transformer
from src.model.products import Linear, PackedWeight, linear, pack_weights
from src.run_directory import RunDirectory, identify_weights
from src.system import private_api
from tests.inference.runs import prompts, write_run

packs = pytest.mark.skipif(not private_api.can_pack_weights(), reason="needs a processor with AVX-512 BF16")
SHAPES = {"square": (768, 768), "up": (3072, 768), "down": (768, 3072), "head": (5003, 768), "odd": (37, 19)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def model(run: Path) -> InferenceModel:
    return load_model(run, experts="ffn", dtype=torch.bfloat16)


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if isinstance(weight, PackedWeight)}


def weights_of(run: Path) -> dict[str, Tensor]:
    directory = RunDirectory(run)
    files = (directory.backbone_path, directory.experts_path)
    return {name: tensor for path in files for name, tensor in safetensors.torch.load_file(path).items()}


@packs
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.inference_mode()
def test_products_have_the_bits_of_plain_ones(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(shape).bfloat16(), torch.randn(shape[0]).bfloat16()
    packed = PackedWeight.of(weight)
    address, num_bytes = private_api.packed_memory(packed.packed)
    assert packed.nbytes == weight.nbytes and address and num_bytes >= weight.nbytes
    for rows in (1, 2, 5, 8, 32, 128, 512):
        inputs = torch.randn(rows, shape[1]).bfloat16()
        assert torch.equal(linear(inputs, packed), F.linear(inputs, weight)), rows
        assert torch.equal(linear(inputs, packed, bias), F.linear(inputs, weight, bias)), rows
    inputs = torch.randn(2, 3, shape[1]).bfloat16()
    assert torch.equal(linear(inputs, packed), F.linear(inputs, weight))


@packs
def test_what_is_packed_at_load_and_what_stays_plain(run: Path, model: InferenceModel) -> None:
    names = {f"blocks.{layer}.{part}.weight" for layer in range(3) for part in ("attention.qkv", "attention.out")}
    names |= {f"blocks.{layer}.shared_expert.{part}.weight" for layer in range(3) for part in ("up", "down")}
    assert packed_names(model) >= names | {"head.weight"}
    assert all("norm" not in name and "router" not in name and "embedding" not in name for name in packed_names(model))
    for dtype in (None, torch.float32, torch.float16):
        assert not packed_names(load_model(run, experts="ffn", dtype=dtype))


@packs
def test_generation_and_logits_are_those_of_plain_weights(run: Path, model: InferenceModel) -> None:
    plain = Transformer(model.config)
    plain.load_state_dict(weights_of(run))
    plain.to(torch.bfloat16).eval().requires_grad_(False)
    for block, loaded in zip(plain.blocks, model.blocks, strict=True):
        block.get_submodule("router").load_state_dict(loaded.get_submodule("router").state_dict(), assign=True)
    with torch.inference_mode():
        for batch, tokens in ((1, 1), (8, 1), (2, 16)):
            assert torch.equal(model(prompts(batch, tokens)), plain(prompts(batch, tokens)))
    generated = (generate(each, prompts(3, 5), max_new_tokens=9) for each in (model, plain))
    assert torch.equal(*generated)


@packs
def test_a_head_that_is_the_embedding_stays_plain() -> None:
    config = replace(dense_config("small"), vocab_size=300, tie_embeddings=True, activation="swiglu")
    model = Transformer(config).bfloat16()
    pack_weights(model, "cpu", None)
    assert model.head.weight is model.embedding.weight
    assert not isinstance(model.head.weight, PackedWeight)
    assert {name.split(".")[-2] for name in packed_names(model)} == {"qkv", "out", "up", "gate", "down"}


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[InferenceModel], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "another dtype and back": lambda model: copy.deepcopy(model).to(torch.float32).to(torch.bfloat16),
    "assigned state": lambda model: _with_state(copy.deepcopy(model).to(torch.float32), model),
}


def _with_state(target: InferenceModel, model: InferenceModel) -> InferenceModel:
    target.load_state_dict(model.state_dict(), assign=True)
    return target


@packs
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_plain_and_computes_the_same(model: InferenceModel, how: str) -> None:
    made = COPIES[how](model)
    assert packed_names(model) and not packed_names(made)
    assert all(isinstance(weight, nn.Parameter) for weight in made.parameters())
    with torch.inference_mode():
        assert torch.equal(made(prompts(2, 7)), model(prompts(2, 7)))


@packs
def test_a_state_dict_is_plain_and_can_be_saved(run: Path, model: InferenceModel, tmp_path: Path) -> None:
    state = model.state_dict()
    assert {type(tensor) for tensor in state.values()} == {Tensor}
    stored = {name: tensor.to(state[name].dtype) for name, tensor in weights_of(run).items() if "router" not in name}
    assert all(torch.equal(state[name], tensor.bfloat16()) for name, tensor in stored.items())
    safetensors.torch.save_file(state, tmp_path / "saved.safetensors")
    assert identify_weights(safetensors.torch.load_file(tmp_path / "saved.safetensors")) == identify_weights(state)
    assert torch.equal(saved(state)["head.weight"], state["head.weight"])


@packs
def test_conversions_unpack_or_keep(model: InferenceModel) -> None:
    names, head = packed_names(model), model.state_dict()["head.weight"]
    assert packed_names(model.to("cpu")) == packed_names(model.to(torch.bfloat16)) == names
    assert packed_names(model.requires_grad_(False)) == names
    model.to(torch.float32)
    assert not packed_names(model)
    assert torch.equal(model.head.weight, head.float())


@packs
def test_values_are_those_of_the_plain_weight(model: InferenceModel) -> None:
    weight, plain = model.head.weight, model.state_dict()["head.weight"]
    assert isinstance(weight, PackedWeight) and (weight.shape, weight.dtype) == (plain.shape, plain.dtype)
    assert torch.equal(weight, plain) and torch.equal(weight[3], plain[3]) and torch.equal(weight.T, plain.T)
    assert torch.equal(torch.cat([weight, plain]), torch.cat([plain, plain]))
    assert torch.equal(F.linear(plain[:2], weight), F.linear(plain[:2], plain))
    assert sum(each.numel() for each in model.parameters()) == sum(each.numel() for each in model.state_dict().values())


@packs
def test_gradients_of_inputs_pass_through(model: InferenceModel) -> None:
    plain = model.state_dict()["head.weight"]
    inputs = torch.randn(4, plain.shape[1]).bfloat16().requires_grad_()
    linear(inputs, model.head.weight).float().square().sum().backward()
    other = inputs.detach().clone().requires_grad_()
    F.linear(other, plain).float().square().sum().backward()
    assert inputs.grad is not None and other.grad is not None
    assert torch.equal(inputs.grad, other.grad)


REFUSED: dict[str, Callable[[InferenceModel], object]] = {
    "in place": lambda model: model.head.weight.mul_(2),
    "an index": lambda model: model.head.weight.__setitem__(0, 1),
    "training": lambda model: model.requires_grad_(True),
    "a state that is not assigned": lambda model: model.load_state_dict(model.state_dict()),
    "an address": lambda model: model.head.weight.data_ptr(),
    "memory of several processes": lambda model: model.share_memory(),
    "safetensors of the parameters themselves": lambda model: safetensors.torch.save(dict(model.named_parameters())),
}


@packs
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_with_the_remedy(model: InferenceModel, what: str) -> None:
    before = model.state_dict()["head.weight"]
    with pytest.raises(RuntimeError, match=r"packed for this processor.*copy\.deepcopy\(model\)"):
        REFUSED[what](model)
    assert torch.equal(model.state_dict()["head.weight"], before)


@pytest.mark.parametrize("gone", ["_reorder_linear_weight", "_linear_pointwise"])
def test_weights_stay_plain_without_the_private_products(run: Path, monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    expected = load_model(run, experts="ffn", dtype=torch.bfloat16)(prompts(2, 7))
    others = {name: getattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")}
    del others[gone]
    monkeypatch.setattr(torch.ops, "mkldnn", type("Namespace", (), others))
    private_api.can_pack_weights.cache_clear()
    try:
        with load_model(run, experts="ffn", dtype=torch.bfloat16) as model:
            assert not packed_names(model)
            assert torch.equal(model(prompts(2, 7)), expected)
    finally:
        private_api.can_pack_weights.cache_clear()


def test_weights_stay_plain_where_the_processor_lacks_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": False})
    assert not private_api.can_pack_weights.__wrapped__()


MEASURE = """
import sys
from pathlib import Path
from src.benchmarks.memory_use import sampled_peak
from src.inference import load_model

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon:")))

before = anonymous()
with sampled_peak(anonymous, 0.001) as peak:
    model = load_model(sys.argv[1])
print(peak[0] - before, anonymous() - before, "torch._dynamo" in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts anonymous memory")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path: Path) -> None:
    config = replace(dense_config("small"), hidden_size=512, num_layers=4, intermediate_size=2048)
    run = RunDirectory(tmp_path)
    run.write_config({"model": config.to_dict()})
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    weights = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    run.write_weights(weights)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, loaded, compiler = done.stdout.split()
    size = sum(weight.nbytes for weight in weights.values())
    assert compiler == "False"
    assert int(loaded) <= 1.05 * size
    assert int(peak) <= 1.15 * size


def test_layers_outside_of_a_model_are_packed_alike() -> None:
    layers = nn.Sequential(Linear(8, 4), Linear(4, 2)).bfloat16()
    pack_weights(layers, "cpu", None)
    assert len(packed_names(layers)) == (2 if private_api.can_pack_weights() else 0)
