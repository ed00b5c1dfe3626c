"""What tables are built from: a model in memory, a run directory, or another table, to change its precision.

U token ids, L layers, E experts, D hidden, F intermediate, V vocabulary.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from src.errors import LutError
from src.lut.layout import TableLayout
from src.lut.manifest import MANIFEST_NAME, Manifest, read_manifest
from src.lut.scan import TableScan, check_shard, read_row_ids, read_token_counts
from src.model import ModelConfig, Transformer
from src.model.experts import EmbeddingExperts, LayerExperts, expert_inputs, ffn, ffn_matrices
from src.model.products import stacked_product
from src.run_directory import EXPERTS_PREFIX, Identity, RunDirectory, identify_weights


class RowSource(Protocol):
    """Gives expert rows. A builder requests all layers of a run of rows in order, then the next run.

    Rows are numbered in the order of their ids; where each id has one, a row's number is its id.
    """

    @property
    def config(self) -> ModelConfig | TableLayout: ...

    @property
    def identity(self) -> Identity | Manifest:
        """The weights that the rows were computed from; a manifest may not know them."""
        ...

    @property
    def rows_from(self) -> str:
        """What computes the rows, for the manifest; an interrupted build can only be resumed with the same value."""
        ...

    @property
    def held_row_bytes(self) -> int:
        """Bytes that the source keeps in memory for each id of the run requested last."""
        ...

    @property
    def row_ids(self) -> Tensor | None:
        """The ids that have a row (R,) int64, in ascending order; None: all of them."""
        ...

    def layer_rows(self, layer: int, first_token: int, num_tokens: int) -> Tensor:
        """Return the rows (num_tokens, E, D) float32 of consecutive numbers."""
        ...


class TableRows:
    """Decoded rows of a table; identities, tokenizer and token counts are those of that table."""

    def __init__(self, lut_dir: Path) -> None:
        """Open the table; LutError when it is not whole."""
        self.lut_dir = lut_dir
        manifest = read_manifest(lut_dir)
        self.config, self.identity, self.tokenizer = manifest.layout, manifest, manifest.tokenizer
        self.rows_from = f"table in {manifest.layout.precision}, its rows from {manifest.rows_from}"
        self.held_row_bytes = manifest.layout.row_bytes
        for shard in manifest.shards:
            check_shard(lut_dir, shard, manifest.layout)
        counts = read_token_counts(lut_dir, manifest)
        self.token_counts = None if counts is None else torch.from_numpy(counts)
        row_ids = read_row_ids(lut_dir, manifest)
        self.row_ids = None if row_ids is None else torch.from_numpy(row_ids)
        self._scan = TableScan(lut_dir, manifest.layout)
        self._run, self._rows = (0, 0), torch.empty(0, dtype=torch.uint8)

    def layer_rows(self, layer: int, first_token: int, num_tokens: int) -> Tensor:
        """Decode one layer of consecutive rows (num_tokens, E, D); the run's bytes are read and checked once."""
        layout = self.config
        if self._run != (first_token, num_tokens):
            self._rows = torch.empty(0, dtype=torch.uint8)  # free the last run before the next is read
            self._rows = torch.from_numpy(self._scan.read(first_token, num_tokens))
            self._run = first_token, num_tokens
        vectors = self._rows.view(num_tokens, layout.num_layers, layout.num_experts, layout.vector_bytes)[:, layer]
        return layout.codec.decode(vectors, layout.hidden_size).to(torch.float32)


COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ACTIVATION_BYTES = 32 * 2**20
"""What the activations of one expert may take; more tokens are computed in parts."""


def require_lookup_form(config: ModelConfig) -> None:
    """Raise LutError for a model that cannot become a table."""
    if config.architecture != "mole":
        reason = "has no routed experts" if config.architecture == "dense" else "has experts that read hidden states"
        raise LutError(
            f"this {config.architecture} model {reason}, so there is nothing to look up by token id; "
            "only experts with model.expert_input=embedding become a table"
        )


class ModelRows:
    """Rows of a model in memory, on its device."""

    held_row_bytes = 0

    def __init__(self, model: Transformer, compute_dtype: str = "float32", *, identity: Identity | None = None) -> None:
        """Take the model as it is now; without an `identity` its weights are hashed."""
        require_lookup_form(model.config)
        if not isinstance(model.experts, EmbeddingExperts):
            raise LutError("this model is already in its lookup form; build from its training form or from its table")
        self.config, self._embedding, self._experts = model.config, model.embedding.weight, model.experts
        self._dtype, self.rows_from = _compute_dtype(compute_dtype), _rows_from(model.config, compute_dtype)
        self.identity = identity or identify_weights(model.state_dict())
        self.row_ids = None if model.has_row is None else model.has_row.nonzero().flatten().cpu()

    @torch.no_grad()
    def layer_rows(self, layer: int, first_token: int, num_tokens: int) -> Tensor:
        part = self._experts[layer]
        assert isinstance(part, LayerExperts)
        experts = part.experts
        embeddings = self._embedding[_inputs(self.config, self.row_ids, first_token, num_tokens)]
        inputs = _normed(embeddings, part.norm.weight, self.config.norm_eps).to(self._dtype)
        weights = (tuple(weight[index : index + 1] for weight in experts.weights) for index in range(len(experts.up)))
        return _run_experts(inputs, weights, self.config.num_experts)


@dataclass
class RunRows:
    """Rows of a run directory, computed on `device` with one expert there at a time instead of the model."""

    run: RunDirectory
    compute_dtype: str = "float32"
    device: torch.device | str = "cpu"
    held_row_bytes = 0

    def __post_init__(self) -> None:
        self.config, self.identity = self.run.model_config(), self.run.identity()
        self._dtype, self.rows_from = _compute_dtype(self.compute_dtype), _rows_from(self.config, self.compute_dtype)
        require_lookup_form(self.config)
        self._embedding_path = (self.run.base() or self.run).backbone_path
        if not self.run.experts_path.is_file():
            raise LutError(
                f"{self.run.experts_path}: missing, so this run holds no training form to build a table from"
            )
        self.row_ids = None
        if self.config.expert_ids == "seen":
            with safe_open(self.run.backbone_path, framework="pt") as handle:
                if "has_row" not in handle.keys():  # noqa: SIM118 (a handle is no dictionary)
                    raise LutError(
                        f"{self.run.backbone_path}: does not say which ids have rows, but model.expert_ids is seen; "
                        "copy config.yaml and weights of one run"
                    )
                self.row_ids = handle.get_tensor("has_row").nonzero().flatten()

    @torch.no_grad()
    def layer_rows(self, layer: int, first_token: int, num_tokens: int) -> Tensor:
        with safe_open(self._embedding_path, framework="pt") as handle:
            wanted = _inputs(self.config, self.row_ids, first_token, num_tokens)
            stored = handle.get_slice("embedding.weight")
            if isinstance(wanted, slice):
                embeddings = stored[wanted].to(self.device)
            else:
                first, last = wanted.aminmax()
                embeddings = stored[int(first) : int(last) + 1][wanted - first].to(self.device)
        prefix = f"{EXPERTS_PREFIX}{layer}."
        with safe_open(self.run.experts_path, framework="pt") as handle:
            norm = handle.get_tensor(f"{prefix}norm.weight").to(self.device)
            inputs = _normed(embeddings, norm, self.config.norm_eps).to(self._dtype)
            matrices = [handle.get_slice(f"{prefix}experts.{name}") for name in ffn_matrices(self.config.activation)]
            parts = (slice(index, index + 1) for index in range(self.config.num_experts))
            weights = (tuple(weight[part].to(self.device) for weight in matrices) for part in parts)
            return _run_experts(inputs, weights, self.config.num_experts)


def open_source(
    source: RowSource | Transformer | RunDirectory | Path | str, compute_dtype: str = "float32"
) -> RowSource:
    """Return the row source of a model, of a run directory, or of another table's directory.

    A path is a table when it holds a manifest, a run directory otherwise. Experts compute in `compute_dtype`, a name of
    `COMPUTE_DTYPES`; a table computes nothing.
    """
    if isinstance(source, Transformer):
        return ModelRows(source, compute_dtype)
    if isinstance(source, RunDirectory):
        return RunRows(source, compute_dtype)
    if isinstance(source, (Path, str)):
        path = Path(source)
        return TableRows(path) if (path / MANIFEST_NAME).is_file() else RunRows(RunDirectory(path), compute_dtype)
    return source


def turn_tokens(intermediate_size: int, dtype: torch.dtype) -> int:
    """Tokens that are run through an expert of this width at a time."""
    return max(1, ACTIVATION_BYTES // (intermediate_size * dtype.itemsize))


_READ = ", which read "


def inputs_note(config: ModelConfig) -> str:
    """Return how a table's `rows_from` says that experts read embeddings of other ids; empty where they do not."""
    if config.shared_expert_row:
        return f"{_READ}one embedding for all ids"
    return (
        "" if config.expert_permutation is None else f"{_READ}embeddings permuted with seed {config.expert_permutation}"
    )


def recorded_inputs(rows_from: str) -> str:
    """Return the `inputs_note` at the end of `rows_from`; empty where it has none."""
    _, start, note = rows_from.partition(_READ)
    return start + note


def _rows_from(config: ModelConfig, compute_dtype: str) -> str:
    return f"experts in {compute_dtype}{inputs_note(config)}"


def _inputs(config: ModelConfig, row_ids: Tensor | None, first_row: int, num_rows: int) -> slice | Tensor:
    """Return which embeddings (U) the experts of consecutive rows read."""
    numbers = slice(first_row, first_row + num_rows)
    if row_ids is not None:
        return expert_inputs(config, row_ids[numbers])
    if config.reads_own_embedding:
        return numbers
    return expert_inputs(config, torch.arange(numbers.start, numbers.stop))


def _compute_dtype(name: str) -> torch.dtype:
    if name not in COMPUTE_DTYPES:
        raise LutError(f"compute_dtype {name!r} is unknown; choose one of {', '.join(COMPUTE_DTYPES)}")
    return COMPUTE_DTYPES[name]


def _normed(embeddings: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm (U, D) embeddings of any dtype in float32."""
    return F.rms_norm(embeddings.float(), weight.shape, weight.float(), eps)


def _run_experts(inputs: Tensor, weights: Iterable[tuple[Tensor, ...]], num_experts: int) -> Tensor:
    """Return (U, E, D) float32: every expert, with weights (1, D, F) or (1, F, D), on the same (U, D) inputs."""
    rows = torch.empty(len(inputs), num_experts, inputs.shape[1], device=inputs.device)
    with _full_precision(inputs.device):
        for index, expert in enumerate(weights):
            matrices = [weight.to(inputs.dtype) for weight in expert]
            size = turn_tokens(expert[0].shape[-1], inputs.dtype)
            for target, turn in zip(rows[:, index].split(size), inputs.split(size), strict=True):
                target.copy_(ffn(turn.unsqueeze(0), *matrices, multiply=stacked_product).squeeze(0))
    return rows


@contextmanager
def _full_precision(device: torch.device) -> Generator[None]:
    """Forbid TF32 and autocast for the block: the table is read many times, so build it at full precision."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(allowed)
