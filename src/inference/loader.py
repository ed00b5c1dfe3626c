"""Loads a run for inference, in either form. The lookup form never reads an expert weight."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from src.errors import LutMismatchError, RunError
from src.inference.disk_experts import DiskExperts
from src.lut import LutStore
from src.lut.manifest import MANIFEST_NAME, read_manifest
from src.lut.sources import inputs_note, recorded_inputs, require_lookup_form
from src.model import ModelConfig, Transformer
from src.model.experts import EmbeddingExperts
from src.model.products import pack_weights
from src.model.router import Router
from src.model.transformer import Block, layer_router
from src.run_directory import EXPERTS_PREFIX, Identity, RunDirectory, read_metadata, read_tensors

ExpertForm = Literal["auto", "lut", "ffn"]


class InferenceModel(Transformer):
    """A `Transformer` in eval mode that closes its table, if it has one, when it is closed.

    A plug-in can be attached to the model that it was trained on, and detached again: routers and experts, in either
    form, come and go, and all other weights stay in memory once.
    """

    run: RunDirectory
    identity: Identity
    """Of the weights as they were loaded."""
    _alone: ModelConfig | None = None
    """The config without a plug-in, while one is attached."""

    def attach(
        self,
        run_dir: Path | str | RunDirectory,
        *,
        experts: ExpertForm = "auto",
        lut: str = "lut",
        reader: str = "auto",
        cache_mb: float = 0,
    ) -> None:
        """Add routers and experts of a plug-in to this model, which is its base; in place of one that is attached.

        Arguments and errors as in `load_model`; RunError also where the plug-in was trained on another model. The model
        must not be computing meanwhile.
        """
        plug_in, weight = as_run(run_dir).require(), self.embedding.weight
        plug_in.require_base(self.run.path, self.identity)
        config = _inference_config(plug_in)
        weights = read_tensors(plug_in.backbone_path)
        routers = _routers(weights, config, plug_in.backbone_path)
        if ("has_row" in weights) != (config.expert_ids == "seen"):
            raise RunError(f"{plug_in.backbone_path}: has_row does not fit model.expert_ids of config.yaml")
        source = _expert_source(plug_in, config, experts, lut, reader, cache_mb, weight.device)
        if isinstance(source, EmbeddingExperts):
            source.to(device=weight.device, dtype=weight.dtype)
        self.detach()
        self._alone, self.config, self.experts = self.config, config, source
        self.has_row = weights["has_row"].to(weight.device) if "has_row" in weights else None
        for layer, router in routers.items():
            cast(Block, self.blocks[layer]).router = router.to(weight.device)
        _widen_routers(self).eval().requires_grad_(False)

    def detach(self) -> None:
        """Take out what is attached, and close its table; the model is its base again, bit for bit."""
        if self._alone is None:
            return
        self.close()
        self.config, self.experts, self.has_row, self._alone = self._alone, None, None, None
        for block in self.blocks:
            cast(Block, block).router = None

    def close(self) -> None:
        if isinstance(self.experts, DiskExperts):
            self.experts.close()

    def __enter__(self) -> "InferenceModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_model(
    run_dir: Path | str | RunDirectory,
    *,
    experts: ExpertForm = "auto",
    lut: str = "lut",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    reader: str = "auto",
    cache_mb: float = 0,
    base: Path | str | None = None,
    attach: Path | str | RunDirectory | None = None,
) -> InferenceModel:
    """Load a run directory.

    Args:
        run_dir: needs config.yaml, backbone.safetensors and, by form, a table or experts.safetensors.
        experts: `lut` fetches rows from a table, `ffn` computes them; `auto` prefers a finished table.
        lut: name of the table's directory inside the run.
        device: where the model computes.
        dtype: what it computes in; None keeps what was saved. Routers decide in at least float32.
        reader: how the table is read (see `LutStore.open`); `memory` keeps it on `device`.
        cache_mb: MiB of rows kept in memory.
        base: the run that a plug-in was trained on, where that is not the path in its config.yaml.
        attach: a plug-in for `run_dir`, of which `experts`, `lut`, `reader` and `cache_mb` then speak.

    Raises:
        RunError: the run is incomplete, or its files do not belong together.
        LutError: there is no table of that name, it is damaged, or it belongs to another model.
    """
    run = as_run(run_dir, base).require()
    if attach is not None or run.plug_in() is not None:
        whole, plug_in = (run, as_run(attach)) if attach is not None else (run.base(), run)
        assert whole is not None
        model = load_model(whole, device=device, dtype=dtype)
        model.attach(plug_in, experts=experts, lut=lut, reader=reader, cache_mb=cache_mb)
        return model
    config, identity = _inference_config(run), run.identity()  # which refuses a missing or foreign file by name
    with torch.device("meta"), _Undrawn():
        model = InferenceModel(config, with_experts=False)
    model.run, model.identity = run, identity
    _load(model, run.backbone_path)
    model.experts = _expert_source(run, config, experts, lut, reader, cache_mb, device)
    pack_weights(model, device, dtype)
    return _widen_routers(model.to(device=device, dtype=dtype)).eval().requires_grad_(False)


def as_run(run_dir: Path | str | RunDirectory, base: Path | str | None = None) -> RunDirectory:
    """Return the run directory at a path; it plugs into `base`, where that is given."""
    if isinstance(run_dir, RunDirectory):
        return run_dir
    return RunDirectory(Path(run_dir), None if base is None else Path(base))


def _inference_config(run: RunDirectory) -> ModelConfig:
    return replace(run.model_config(), expert_execution="unique", gradient_checkpointing=False)


def _expert_source(
    run: RunDirectory,
    config: ModelConfig,
    experts: ExpertForm,
    lut: str,
    reader: str,
    cache_mb: float,
    device: torch.device | str,
) -> DiskExperts | EmbeddingExperts | None:
    if (written_form(run, lut) if experts == "auto" else experts) == "lut":
        require_lookup_form(config)
        return DiskExperts(_open_store(run, lut, reader, cache_mb, device))
    return _experts(run, config) if config.architecture == "mole" else None


class _Undrawn(TorchFunctionMode):
    """Draws no initial weights: of meta tensors, `normal_` imports torch's compiler, a second and 70 MB."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return None if func.__name__ == "normal_" else func(*args, **(kwargs or {}))


def written_form(run: RunDirectory, lut: str = "lut") -> Literal["lut", "ffn"]:
    """Return the form that `load_model` prefers: `lut` where there is a finished table of that name."""
    has_table = run.model_config().architecture == "mole" and (run.lut_path(lut) / MANIFEST_NAME).is_file()
    return "lut" if has_table else "ffn"


def require_table(run: RunDirectory, experts: ExpertForm, lut: str) -> None:
    """Raise LutError where `load_model` would find no table, or one with another name than the default is missing."""
    if lut != "lut" or (written_form(run, lut) if experts == "auto" else experts) == "lut":
        read_manifest(run.lut_path(lut))


def _widen_routers(model: InferenceModel) -> InferenceModel:
    """Cast the routers' weights once, not at each step of each layer: that took 1.5 % of a decode step."""
    for block in model.blocks:
        if (router := cast(Block, block).router) is not None:
            router.to(torch.promote_types(router.weight.dtype, torch.float32))
    return model


def _routers(weights: Mapping[str, Tensor], config: ModelConfig, path: Path) -> dict[int, Router]:
    """Return the routers of a plug-in by layer, with weights that were read from `path`."""
    routers = dict[int, Router]()
    for layer in config.mixture_layers:
        with torch.device("meta"):
            routers[layer] = layer_router(config)
        try:
            routers[layer].load_state_dict({"weight": weights[f"blocks.{layer}.router.weight"]}, assign=True)
        except (KeyError, RuntimeError) as error:
            raise RunError(f"{path}: does not fit the model of config.yaml: {error}") from error
    return routers


def _experts(run: RunDirectory, config: ModelConfig) -> EmbeddingExperts:
    if not run.experts_path.is_file():
        raise RunError(f"{run.experts_path}: missing, so this run has no training form; use --experts lut")
    found, expected = read_metadata(run.experts_path).get("training_form"), run.identity().training_form
    if found != expected:
        raise RunError(
            f"{run.experts_path}: belongs to training form {found}, but backbone.safetensors to {expected}; "
            "copy both from the same run"
        )
    with torch.device("meta"):
        experts = EmbeddingExperts(config)
    _load(experts, run.experts_path, prefix=EXPERTS_PREFIX)
    return experts


def _open_store(run: RunDirectory, lut: str, reader: str, cache_mb: float, device: torch.device | str) -> LutStore:
    store = LutStore.open(run.lut_path(lut), reader=reader, cache_mb=cache_mb, device=device)
    expected = run.identity().backbone
    if store.manifest.backbone != expected:
        store.close()
        raise LutMismatchError(
            f"{run.lut_path(lut)}: was built for backbone {store.manifest.backbone}, but this run's is {expected}; "
            "rebuild the table with `python -m src.reparameterize`, or copy the run it belongs to"
        )
    if inputs_note(config := run.model_config()) != recorded_inputs(store.manifest.rows_from):
        store.close()
        raise LutMismatchError(
            f"{run.lut_path(lut)}: its rows are from {store.manifest.rows_from}, but this run's config has "
            f"model.expert_permutation {config.expert_permutation} and model.shared_expert_row "
            f"{config.shared_expert_row}; rebuild the table"
        )
    return store


def _load(module: torch.nn.Module, path: Path, prefix: str = "") -> None:
    """Assign a file's tensors to the module, their names without the prefix."""
    try:
        weights = {name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
        module.load_state_dict(weights, assign=True)
    except SafetensorError as error:
        raise RunError(f"{path}: not a readable safetensors file ({error}); copy or write it again") from error
    except RuntimeError as error:
        raise RunError(f"{path}: does not fit the model of config.yaml: {error}") from error
