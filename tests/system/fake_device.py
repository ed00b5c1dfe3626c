"""Models on a device that is not the CPU, without one: run as a process of its own, it prints what it found as JSON.

Tensors have shapes and devices but no values (FakeTensorMode). The device is torch's slot for backends of others, set
up from Python: no kernel runs on it, and an operation on tensors of two devices raises. Where the program would wait
for a GPU to learn a value, a stand-in gives one and counts.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import lightning
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from torch.utils.data import DataLoader

from src.data.windows import find_distinct
from src.evaluation.equivalence import compare_greedy, logit_distance, permuted_rows, recoded_rows, zeroed_rows
from src.evaluation.perplexity import window_losses
from src.evaluation.routing_view import measure_token_weights
from src.inference import generate, generation
from src.inference.generation import stream
from src.lut import sources
from src.lut.codecs import CODECS
from src.lut.layout import TableLayout
from src.lut.shard_writer import encode_layer
from src.lut.sources import ModelRows, RunRows
from src.lut.store import layer_decoder
from src.model import KeyValueCache, ModelConfig, Transformer
from src.model.attention import causal_mask, document_mask
from src.model.experts import LayerRows
from src.model.loss import next_token_loss
from src.model.router import Router, load_balance_loss, z_loss
from src.model.step_rows import StepRows
from src.run_directory import Identity
from src.training.config import ObjectiveConfig, OptimizerConfig
from src.training.lightning_module import LanguageModel
from src.training.optimization import build_optimizer, clip_gradients
from src.training.routing_metrics import RoutingMetrics
from tests.model.models import CONFIGS


class Backend(_DummyBackendModule):
    """What torch asks a backend for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("fakegpu", backend_module=Backend())
DEVICE = torch.device("fakegpu:0")


class OneMode(FakeTensorMode):
    """The same mode in every copy of a tensor: caches keep tensors, and metrics copy their initial values."""

    def __deepcopy__(self, _: object) -> "OneMode":
        return self


MODE = OneMode(allow_non_fake_inputs=False)

VALUES = ("_local_scalar_dense", "equal", "is_nonzero")
"""Operations that return a value of a tensor."""
VIEWS = (
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze"),
    *("unbind", "split", "split_with_sizes", "narrow", "alias", "detach", "as_strided", "_reshape_alias"),
)
THROWS = ("cumsum", "cumprod", "logcumsumexp", "histc", "kthvalue", "median", "put_", "_ctc_loss", "nll_loss2d_forward")
"""Those of the list at torch.use_deterministic_algorithms that a model like ours could call with CUDA floats."""


def tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Watch(TorchDispatchMode):
    """Gives values, of which there are none; counts waits for them and what deterministic algorithms refuse on CUDA."""

    def __init__(self, truth: bool) -> None:
        super().__init__()
        self.truth, self.waits, self.refused = truth, Counter[str](), set[str]()
        self.kernels = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, inputs = func.__name__.partition(".")[0], tensors((args, kwargs))
        on_device = any(tensor.device == DEVICE for tensor in inputs)
        if name in VALUES:
            self.waits[name] += on_device
            return self.truth
        if name in ("_unique2", "unique_dim"):
            self.waits[name] += on_device
            return _distinct(inputs[0])
        if name == "bincount":
            self.waits[name] += on_device
            return inputs[0].new_zeros(args[2])
        if name == "nonzero":
            self.waits[name] += on_device
            return inputs[0].new_zeros((0, inputs[0].dim()), dtype=torch.int64)
        outputs = func(*args, **(kwargs or {}))
        made = [tensor for tensor in tensors(outputs) if tensor.device == DEVICE]
        changes = name != "to" or any((t.dtype, t.device) != (inputs[0].dtype, inputs[0].device) for t in made)
        self.kernels[name] += bool(made) and changes and name not in VIEWS
        moved = on_device and any(tensor.device.type == "cpu" for tensor in tensors(outputs))
        self.waits[name] += moved
        if on_device and name in THROWS and inputs[0].is_floating_point():
            self.refused.add(name)
        return outputs


def _distinct(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = ids.new_empty(min(5, ids.numel()))
    return found, torch.empty_like(ids), torch.empty_like(found)


def _shares(tensor: Tensor, sizes: int | list[int], dim: int = 0) -> Any:
    """Split by sizes that a stand-in gave."""
    if isinstance(sizes, list) and sum(sizes) != tensor.shape[dim]:
        part = tensor.shape[dim] // len(sizes)
        sizes = [part] * (len(sizes) - 1) + [tensor.shape[dim] - part * (len(sizes) - 1)]
    return _split(tensor, sizes, dim)


def _unchecked(_model: Transformer, token_ids: Tensor, mask: Tensor | None, *_: object) -> tuple[Tensor, Tensor | None]:
    return token_ids, mask


_split, _tensor = Tensor.split, torch.tensor


def _made(values: object, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    made = _tensor(values, dtype=dtype)
    return torch.zeros(made.shape, dtype=made.dtype, device=device or "cpu")


@contextmanager
def fake_device(truth: bool = False) -> Generator[Watch]:
    """Make tensors without values; `truth` is what every condition on them is."""
    watch = Watch(truth)

    def listed(values: Tensor) -> list[int]:
        watch.waits["tolist"] += values.device == DEVICE
        return [1] * len(values)

    with ExitStack() as stack:
        for owner, name, stand_in in (
            (Tensor, "split", _shares),
            (FakeTensor, "tolist", listed),
            (torch, "tensor", _made),
            (generation, "_fit", _unchecked),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        stack.enter_context(MODE)
        stack.enter_context(watch)
        yield watch


class Rows(torch.nn.Module):
    """A table whose bytes are already on the device."""

    def __init__(self, layout: TableLayout) -> None:
        super().__init__()
        self.layout = layout

    def rows(self, token_ids: Tensor, token_embeddings: Tensor) -> LayerRows:
        token_ids.tolist()  # as the store does
        codes = torch.zeros(len(token_ids), self.layout.row_bytes, dtype=torch.uint8, device=DEVICE)
        return layer_decoder(codes, self.layout)


def model_on_device(config: ModelConfig, precision: str | None = None) -> Transformer:
    with torch.device(DEVICE):
        model = Transformer(config)
    if precision is not None:
        sizes = {key: getattr(config, key) for key in ("vocab_size", "num_layers", "num_experts", "hidden_size")}
        model.experts = Rows(TableLayout(**sizes, precision=precision))
    return model


@contextmanager
def in_bfloat16() -> Generator[None]:
    """Make weights in bfloat16, in which a GPU has grouped products."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def step(config: ModelConfig) -> None:
    """Take an optimizer step of two micro-batches, with every loss and metric of a training step."""
    model = model_on_device(config)
    metrics = RoutingMetrics(config.mixture_layers, config.router_choices, config.top_k).to(DEVICE)
    batch = torch.zeros(2, 2, 8, dtype=torch.int64, device=DEVICE)
    shared = StepRows(model, batch[..., :-1]) if config.expert_execution == "unique_per_step" else None
    for index, windows in enumerate(batch):
        ids, rows = windows[:, :-1], None if shared is None else shared.micro_batch(index)
        trunk = model.trunk(ids, attention_mask=document_mask(ids, 0), expert_rows=rows)
        objective = next_token_loss(trunk.hidden_states, model.head, windows[:, 1:])
        for logits in trunk.router_logits:
            objective = objective + load_balance_loss(logits, config.top_k) + z_loss(logits)
        if trunk.router_logits:
            metrics.update(trunk.router_logits)
        (objective if index == 0 or shared is None else objective + shared.carried()).backward()
    clip_gradients(model.parameters(), 1.0)
    build_optimizer(model.named_parameters(), OptimizerConfig()).step()
    assert {parameter.grad.device for parameter in model.parameters() if parameter.grad is not None} == {DEVICE}


def write(config: ModelConfig, precision: str | None, prompt_device: torch.device, **sampling: Any) -> None:
    model = model_on_device(config, precision).eval()
    prompt, mask = (torch.zeros(3, 7, dtype=dtype, device=prompt_device) for dtype in (torch.int64, torch.bool))
    with torch.no_grad():
        written = generate(model, prompt, max_new_tokens=3, attention_mask=mask, prefill_chunk_tokens=3, **sampling)
    assert (written.shape, written.device) == ((3, 10), prompt_device)


def compare(config: ModelConfig, precision: str | None) -> None:
    """Run what `verify` and `inspect_lut` compute, on windows that lie on the CPU."""
    computed, other = model_on_device(config).eval(), model_on_device(config, precision).eval()
    windows = torch.zeros(4, 9, dtype=torch.int64)
    mask = partial(document_mask, separator_id=0)
    for rows_of in (None, zeroed_rows(other), permuted_rows(other), recoded_rows(other, CODECS["float16"])):
        logit_distance(computed, other, windows, mask=mask, rows_of=rows_of)
        window_losses(other, windows, mask=mask, rows_of=rows_of)
    compare_greedy(computed, other, windows, new_tokens=2)
    measure_token_weights(other, windows[:, 1:], 0, mask=mask)


def encode(precision: str) -> None:
    codec = CODECS[precision]
    target = torch.zeros(4, 3, codec.vector_bytes(128), dtype=torch.uint8, device=DEVICE)
    encode_layer(codec, torch.zeros(4, 3, 128, device=DEVICE), target)


class Stored:
    """Weights of a run, read to the CPU."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.get_tensor = self.get_slice = weights.__getitem__

    def __enter__(self) -> "Stored":
        return self

    def __exit__(self, *_: object) -> None: ...


def build(config: ModelConfig) -> None:
    """Compute and encode rows of a model on the device, and of the weights of a run."""
    stored = Stored(dict(Transformer(config).state_dict()))
    run: Any = SimpleNamespace(
        model_config=lambda: config,
        identity=lambda: None,
        base=lambda: None,
        experts_path=Path(__file__),
        backbone_path=Path(__file__),
    )
    with patch.object(sources, "safe_open", Mock(return_value=stored)):
        for source in (ModelRows(model_on_device(config), identity=Identity("", "")), RunRows(run, device=DEVICE)):
            rows = source.layer_rows(1, 3, 9)
            assert (rows.device, rows.shape) == (DEVICE, (9, config.num_experts, config.hidden_size))


WIDE = replace(CONFIGS["mole"], hidden_size=128, vocab_size=300)
DRAWN: dict[str, Any] = {"temperature": 0.8, "top_k": 3, "top_p": 0.9, "seed": 0}


def run_everything() -> dict[str, object]:
    """Run every case; an operation on two devices raises."""
    cases, refused = 0, set[str]()

    def run(case: Callable[[], None], truth: bool = False) -> None:
        nonlocal cases
        with fake_device(truth) as watch:
            case()
        cases += 1
        refused.update(watch.refused)

    for name, config in CONFIGS.items():
        for execution in ("unique", "per_token", "unique_per_step") if config.architecture == "mole" else ("unique",):
            used = replace(config, expert_execution=execution, gradient_checkpointing=name.endswith("top2"))
            run(lambda used=used: step(used))
    forms = [(CONFIGS["dense"], None), (CONFIGS["moe"], None), (WIDE, None), *((WIDE, name) for name in CODECS)]
    for config, precision in forms:
        for sampling in ({}, DRAWN):
            for device in (DEVICE, torch.device("cpu")):
                run(lambda c=config, p=precision, d=device, s=sampling: write(c, p, d, **s))
    for precision in (None, "bfloat16", "nf4"):
        run(lambda p=precision: compare(WIDE, p))
    for precision in CODECS:
        run(lambda p=precision: encode(p), truth=True)
    for config in (WIDE, replace(WIDE, expert_permutation=0)):
        run(lambda c=config: build(c))
    return {"cases": cases, "refused": sorted(refused)}


def caught() -> str:
    """Return the error that a mask made on the CPU raises."""

    def on_cpu(num_new: int, num_total: int, _device: torch.device) -> Tensor:
        return causal_mask(num_new, num_total, torch.device("cpu"))

    with patch("src.model.transformer.causal_mask", on_cpu), fake_device():
        try:
            write(CONFIGS["dense"], None, DEVICE)
        except Exception as error:  # noqa: BLE001 - its name is what is asked for
            return type(error).__name__
    return "nothing"


def decode_waits() -> dict[str, Sequence[int]]:
    """Return the waits of one decode step, by form, batch and way of choosing; the ids stay where the prompt is."""
    found: dict[str, Sequence[int]] = {}
    for name, config, precision in (
        ("dense", CONFIGS["dense"], None),
        ("moe", CONFIGS["moe"], None),
        ("table", WIDE, "nf4"),
        ("static", WIDE, "nf4"),
    ):
        cache = partial(KeyValueCache, static=name == "static")
        for batch in (1, 8):
            for way, sampling in {"greedy": dict[str, Any](), "drawn": DRAWN}.items():
                with fake_device() as watch, patch.object(generation, "KeyValueCache", cache):
                    with in_bfloat16():
                        model = model_on_device(config, precision).eval()
                    prompt = torch.zeros(batch, 7, dtype=torch.int64, device=DEVICE)
                    steps, waits = stream(model, prompt, max_new_tokens=8, stop_ids=[3], **sampling), list[int]()
                    with torch.no_grad():
                        for _ in steps:
                            waits.append(watch.waits.total())
                found[f"{name} {batch} {way}"] = [after - before for before, after in pairwise(waits)]
    return found


def decode_kernels() -> dict[str, list[int]]:
    """Return what a decode step of a bfloat16 table starts on the device more than Dense, with 2 and with 4 layers."""
    found: dict[str, list[int]] = {}
    for batch in (1, 8):
        counts: dict[str, list[int]] = {"table": [], "dense": []}
        for layers in (2, 4):
            mole = replace(WIDE, num_layers=layers)
            dense = replace(mole, num_experts=0, expert_intermediate_size=0)
            for name, config, precision in (("table", mole, "bfloat16"), ("dense", dense, None)):
                with fake_device() as watch:
                    counts[name].append(step_kernels(config, precision, batch, watch))
        found[str(batch)] = [table - dense for table, dense in zip(counts["table"], counts["dense"], strict=True)]
    return found


def step_kernels(config: ModelConfig, precision: str | None, batch: int, watch: Watch) -> int:
    with in_bfloat16():
        model = model_on_device(config, precision).eval()
    for block in model.blocks:
        if config.num_experts:  # routers are in float32, as `load_model` leaves them
            with torch.device(DEVICE):
                block.router = Router(config.hidden_size, config.num_experts, config.top_k)
    steps = stream(model, torch.zeros(batch, 7, dtype=torch.int64), max_new_tokens=4)
    with torch.no_grad():
        next(steps)
        before = watch.kernels.total()
        next(steps)
    return watch.kernels.total() - before


class OnDevice(CPUAccelerator):
    """Lets Lightning train on the device."""

    def setup_device(self, device: torch.device) -> None: ...


class Staying(SingleDeviceStrategy):
    """Leaves the model where it is made: tensors without values cannot be exchanged in a module."""

    def model_to_device(self) -> None: ...

    def teardown(self) -> None: ...


def training_waits() -> dict[str, list[int]]:
    """Return the waits of each of four optimizer steps, of which the second and fourth write logs.

    Steps have one or three micro-batches, so that those of a micro-batch and of a step can be told apart.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found: dict[str, list[int]] = {}
    for name, config in {"dense": CONFIGS["dense"], "moe": CONFIGS["moe"], "mole": WIDE}.items():
        for weight in (0.0, 0.01):
            for micro_batches in (1, 3):
                with fake_device(truth=True) as watch:
                    steps = count_steps(config, ObjectiveConfig(load_balance_weight=weight), micro_batches, watch)
                found[f"{name} {weight} {micro_batches}"] = steps
    return found


def count_steps(config: ModelConfig, objective: ObjectiveConfig, micro_batches: int, watch: Watch) -> list[int]:
    with torch.device(DEVICE), in_bfloat16():
        byte_lengths = torch.ones(config.vocab_size, dtype=torch.int64)
        module = LanguageModel(config, objective, OptimizerConfig(), byte_lengths)
    windows = torch.zeros(micro_batches, 2, 9, dtype=torch.int64)
    batch = find_distinct(windows, config.rows_once_per)
    counts: list[int] = []

    class Count(lightning.Callback):
        def on_train_batch_start(self, *_: Any, **__: Any) -> None:
            counts.append(watch.waits.total())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            counts.append(watch.waits.total())

    trainer = lightning.Trainer(
        accelerator=OnDevice(),
        strategy=Staying(DEVICE),
        max_steps=4,
        log_every_n_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Count()],
    )
    dataset: Any = [batch] * 4
    trainer.fit(module, DataLoader(dataset, batch_size=None))
    return [after - before for before, after in pairwise(counts)]


if __name__ == "__main__":
    print(
        json.dumps(
            {
                **run_everything(),
                "caught": caught(),
                "decode_waits": decode_waits(),
                "training_waits": training_waits(),
                "decode_kernels": decode_kernels(),
            }
        )
    )
