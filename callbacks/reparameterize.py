"""Writes the trained weights and their lookup table when a fit ends well."""

import lightning
from torch import Tensor

from callbacks.failures import RunCallback
from src.lut import build_lut
from src.lut.sources import ModelRows, RunRows
from src.model.sharding import is_sharded, whole_weights
from src.system.console import progress_bar
from src.training.lightning_module import LanguageModel


class ReparameterizeCallback(lightning.Callback):
    """At the end of training: backbone, experts, then the table, its shards shared out over all ranks.

    It runs in `on_train_end`, with the process group alive, and not after an exception or an interrupt, so an
    unfinished fit leaves no manifest. What an interrupted fit wrote of the same weights is kept.
    """

    def __init__(
        self,
        run: RunCallback,
        *,
        dtype: str = "bfloat16",
        chunk_tokens: int | None = None,
        tokenizer: str | None = None,
        token_counts: Tensor | None = None,
    ) -> None:
        """Write into `run`; other arguments as in `src.lut.build_lut`."""
        self.run, self.dtype, self.chunk_tokens = run, dtype, chunk_tokens
        self.tokenizer, self.token_counts = tokenizer, token_counts

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        run, model, rank = self.run.directory, pl_module.model, trainer.global_rank
        has_table = model.config.architecture == "mole"
        weights, identity = whole_weights(model, keep=rank == 0), None
        if rank == 0:
            kept = run.backbone_path.is_file() and run.holds_weights(run.identify(weights), with_experts=has_table)
            identity = run.identity() if kept else run.write_weights(weights)
        del weights
        identity = trainer.strategy.broadcast(identity)  # sent once the weights are written
        if not has_table:
            return
        build_lut(
            # A sharded model is whole nowhere, and ranks write different numbers of chunks, so they cannot gather it.
            RunRows(run, device=model.head.weight.device) if is_sharded(model) else ModelRows(model, identity=identity),
            run.lut_path(),
            dtype=self.dtype,
            chunk_tokens=self.chunk_tokens,
            overwrite=True,
            rank=rank,
            world_size=trainer.world_size,
            barrier=trainer.strategy.barrier,
            broadcast=trainer.strategy.broadcast,
            tokenizer=self.tokenizer,
            token_counts=self.token_counts,
            progress=progress_bar,
        )
