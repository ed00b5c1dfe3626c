"""Training of one model under Lightning: steps, accumulation, logging. The mathematics is in `src.model`.

Optimization is manual, and one batch is the whole accumulation window of one optimizer step. So a position in the data
is one integer, no checkpoint can fall inside an accumulation, and work may be shared over the window.

A micro-batches, B batch, T tokens, V vocabulary.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypedDict

import lightning
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import MeanMetric

from src.data.datamodule import NO_WINDOW
from src.data.windows import StepBatch, find_distinct
from src.model import ModelConfig, Transformer
from src.model.attention import document_mask
from src.model.experts import EmbeddingExperts, ExpertRows
from src.model.loss import next_token_loss, token_losses
from src.model.router import load_balance_loss, z_loss
from src.model.sharding import shard_from_rank_zero, whole
from src.model.step_rows import StepRows
from src.system.signals import StopSignals
from src.training.config import ObjectiveConfig, OptimizerConfig
from src.training.optimization import build_optimizer, build_schedule, clip_gradients, freeze
from src.training.routing_metrics import RoutingMetrics
from src.training.strategy import ShardedStrategy


class StepOutput(TypedDict):
    """What `training_step` returns for callbacks."""

    losses: Tensor
    """(A,) this rank's loss per micro-batch."""
    gradient_norm: Tensor
    """Global norm before clipping."""
    finite: bool
    """Whether all of it was finite on every rank; if not, no weight was changed."""
    computed_ids: int
    """Number of ids that embedding experts were computed for, over all micro-batches of this rank."""
    signal: int
    """A stop signal that a rank received, the same on all of them; 0 if none."""


class LanguageModel(lightning.LightningModule):
    """A `Transformer` with its objective, optimizer and metrics."""

    byte_lengths: Tensor

    def __init__(
        self,
        model: ModelConfig,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
        byte_lengths: Tensor,
        *,
        document_separator: int | None = None,
        without_weights: bool = False,
        is_plug_in: bool = False,
    ) -> None:
        """Create model and metrics.

        `byte_lengths` (V,) int64 are the numbers of UTF-8 bytes of each id's text; `document_separator` is the id that
        ends a document, if attention must not cross documents. `without_weights` leaves the model on `meta`, for a rank
        that receives its parts of a sharded model from rank 0. The state of a plug-in is that of routers and experts.
        """
        super().__init__()
        self.automatic_optimization = False
        self.signals = StopSignals()
        """Stop signals of this process, which every step's outcome reports."""
        self.document_separator = document_separator
        self.objective, self.optimizer_config = objective, optimizer
        with torch.device("meta") if without_weights else nullcontext():
            self.model = Transformer(model)
        freeze(self.model.named_parameters(), optimizer)
        if is_plug_in:  # as hooks, which copies of the module for averaging keep
            self.register_state_dict_post_hook(_leave_out_base)
            self.register_load_state_dict_pre_hook(_take_base)
        self.register_buffer("byte_lengths", byte_lengths, persistent=False)
        self.routing = RoutingMetrics(model.mixture_layers, model.router_choices, model.top_k)
        self.validation_loss, self.validation_bytes = _exact_mean(), _exact_mean()
        self.validation_routing = self.routing.clone()

    def configure_model(self) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            gathered = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
            shard_from_rank_zero(self.model, strategy.shard_mesh(), strategy.root_device, gathered=gathered)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = build_optimizer(self.model.named_parameters(), self.optimizer_config)
        schedule = build_schedule(optimizer, self.optimizer_config, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "name": "train/learning_rate"}}

    def forward(self) -> Tensor:  # type: ignore[override]
        """Return a zero that depends on every parameter, in the order in which a step uses them."""
        model, of_layers = self.model, dict[int, nn.Module]()
        if isinstance(model.experts, EmbeddingExperts):
            of_layers = dict(zip(model.config.mixture_layers, model.experts, strict=True))
        layers = [part for layer, block in enumerate(model.blocks) for part in (of_layers.get(layer), block)]
        parts = (model.embedding, *layers, model.norm, model.head)
        weights = (weight for part in parts if part is not None for weight in part.parameters())
        return torch.stack([weight.sum() for weight in weights]).sum() * 0

    def on_train_start(self) -> None:
        """Let DDP allocate its buckets, and arrange them in the order in which gradients arrive, before the first step.

        It does so after a first backward pass and before the next forward pass. From then on gradients are views of the
        buckets, as long as they are never set to None: new ones would take as much memory again.
        """
        ranks = self.trainer.strategy.model
        if isinstance(ranks, DistributedDataParallel):
            for _ in range(2):
                self.zero_grad(set_to_none=True)
                ranks().backward()

    def training_step(self, batch: StepBatch | Tensor, batch_idx: int) -> StepOutput:  # type: ignore[override]
        """Take one optimizer step on all micro-batches of `batch`, or of windows (A, B, T+1).

        If a loss or a gradient is not finite, the step counts and the schedule advances, but no weight changes.
        """
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad(set_to_none=not isinstance(self.trainer.strategy.model, DistributedDataParallel))
        step = batch if isinstance(batch, StepBatch) else find_distinct(batch, self.model.config.rows_once_per)
        losses = self._backward(step)
        gradient_norm = whole(clip_gradients(self.model.parameters(), self.optimizer_config.gradient_clip_norm))
        finite, signum = self._agree(losses, gradient_norm)
        if not finite:
            optimizer.zero_grad()  # AdamW skips parameters without a gradient; DDP's next exchange makes them views
        optimizer.step()
        self.lr_schedulers().step()  # type: ignore[union-attr]
        self._log_step(losses.mean(), gradient_norm)
        return {
            "losses": losses,
            "gradient_norm": gradient_norm,
            "finite": finite,
            "computed_ids": self._computed_ids(step),
            "signal": signum,
        }

    def _computed_ids(self, batch: StepBatch) -> int:
        config = self.model.config
        per_token = config.architecture == "mole" and config.expert_execution == "per_token"
        return batch[..., :-1].numel() if per_token else sum(map(len, batch.ids))

    def _backward(self, batch: StepBatch) -> Tensor:
        """Accumulate the gradient of `batch` and return the loss of each micro-batch (A,)."""
        losses: list[Tensor] = []
        config = self.model.config
        shares_rows = config.expert_execution == "unique_per_step" and config.architecture == "mole"
        shared = StepRows(self.model, batch[..., :-1], batch.distinct()) if shares_rows else None
        for index, windows in enumerate(batch.windows):
            last = index + 1 == len(batch)
            with self._gradient_sync(last=last):
                if shared is None:
                    loss, objective = self._losses(windows, distinct=batch.distinct(index))
                else:
                    loss, objective = self._losses(windows, expert_rows=shared.micro_batch(index))
                if last and shared is not None:
                    objective = objective + len(batch) * shared.carried()  # which is not a mean over micro-batches
                self.manual_backward(objective / len(batch))
            losses.append(loss.detach())
        return torch.stack(losses)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Score one batch of held-out windows (B, T+1), without the padding that gives all ranks as many."""
        real = batch[:, 0] != NO_WINDOW  # (B,)
        token_ids, targets = batch[:, :-1].clamp(min=0), batch[real, 1:]
        trunk = self.model.trunk(token_ids, attention_mask=self._document_mask(token_ids))
        if not real.any():
            return
        losses = token_losses(trunk.hidden_states[real], self.model.head, targets)  # (B, T)
        self.validation_loss.update(losses)
        self.validation_bytes.update(self.byte_lengths[targets].float())
        if trunk.router_logits:
            self.validation_routing.update([logits[real] for logits in trunk.router_logits])

    def on_validation_epoch_end(self) -> None:
        loss, bytes_per_token = self.validation_loss.compute(), self.validation_bytes.compute()
        self.log("val/loss", loss, prog_bar=True)
        self.log("val/perplexity", loss.exp())
        self.log("val/bits_per_byte", loss / math.log(2) / bytes_per_token, prog_bar=True)
        if self.model.config.num_experts:
            self.log_dict({f"val/{name}": value for name, value in self.validation_routing.compute().items()})
        for metric in (self.validation_loss, self.validation_bytes, self.validation_routing):
            metric.reset()

    def _losses(
        self,
        windows: Tensor,
        *,
        expert_rows: ExpertRows | None = None,
        distinct: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the language-model loss of (B, T+1) windows and the objective, which may add router losses."""
        token_ids = windows[:, :-1]
        mask = self._document_mask(token_ids)
        trunk = self.model.trunk(token_ids, attention_mask=mask, expert_rows=expert_rows, distinct=distinct)
        loss = next_token_loss(trunk.hidden_states, self.model.head, windows[:, 1:])
        objective = loss
        if trunk.router_logits and self.objective.load_balance_weight:
            top_k = self.model.config.top_k
            balance = torch.stack([load_balance_loss(logits, top_k) for logits in trunk.router_logits]).mean()
            objective = objective + self.objective.load_balance_weight * balance
        if trunk.router_logits and self.objective.z_loss_weight:
            drift = torch.stack([z_loss(logits) for logits in trunk.router_logits]).mean()
            objective = objective + self.objective.z_loss_weight * drift
        if trunk.router_logits and self._logs_this_step:
            self.routing.update(trunk.router_logits)
        return loss, objective

    def _document_mask(self, token_ids: Tensor) -> Tensor | None:
        """Return which positions of (B, T) may attend to which (B, T, T), if documents are kept apart."""
        return None if self.document_separator is None else document_mask(token_ids, self.document_separator)

    def _log_step(self, loss: Tensor, gradient_norm: Tensor) -> None:
        if self._logs_this_step:  # not `sync_dist`, which must have the same value at every step
            loss = self.trainer.strategy.reduce(loss.clone(), reduce_op="mean")
        self.log("train/loss", loss, prog_bar=True)
        if not self._logs_this_step:
            return
        self.log("train/perplexity", loss.exp())
        self.log("train/gradient_norm", gradient_norm)
        if self.model.config.num_experts:
            self.log_dict({f"train/{name}": value for name, value in self.routing.compute().items()})
            self.routing.reset()

    def _agree(self, losses: Tensor, gradient_norm: Tensor) -> tuple[bool, int]:
        """Return whether all ranks saw finite numbers only, and a stop signal that one received, or 0."""
        broken = ~(losses.isfinite().all() & gradient_norm.isfinite())
        if self.trainer.world_size == 1:
            return not broken, self.signals.received
        outcome = torch.stack([broken.float(), torch.full_like(broken, self.signals.received, dtype=torch.float32)])
        broken_anywhere, signum = self.trainer.strategy.reduce(outcome, reduce_op="max").tolist()
        return not broken_anywhere, int(signum)

    @property
    def _logs_this_step(self) -> bool:
        interval: int = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        return (self.trainer.fit_loop.total_batch_idx + 1) % interval == 0

    def _gradient_sync(self, *, last: bool) -> AbstractContextManager[Any]:
        """Under DDP, exchange gradients only with the last micro-batch."""
        no_sync = getattr(self.trainer.strategy.model, "no_sync", None)
        return nullcontext() if last or no_sync is None else no_sync()


def _base_names(module: nn.Module, prefix: str) -> list[str]:
    assert isinstance(module, LanguageModel)
    return [f"{prefix}model.{name}" for name, weight in module.model.named_parameters() if not weight.requires_grad]


def _leave_out_base(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    """Leave the frozen weights out of a state: they are in another run."""
    for name in _base_names(module, prefix):
        del state[name]


def _take_base(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Add the frozen weights to a state without them, as they are in the module."""
    for name in _base_names(module, prefix):
        state[name] = module.get_parameter(name.removeprefix(prefix))


def _exact_mean() -> MeanMetric:
    """Return a mean in float64: rounded sums of millions of float32 values would depend on the number of ranks.

    NaN propagates to the mean; dropping it would hide a diverged model.
    """
    metric = MeanMetric(nan_strategy="disable")
    metric.set_dtype(torch.float64)
    return metric
