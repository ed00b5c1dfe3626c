"""Writes the trained weights and their lookup table when a fit ends well."""

from pathlib import Path

import lightning
from torch import Tensor

from src.lut import build_lut
from src.lut.sources import ModelRows, RunRows
from src.model.sharding import is_sharded, whole_weights
from src.run_directory import RunDirectory
from src.system.console import progress_bar
from src.training.lightning_module import LanguageModel


class ReparameterizeCallback(lightning.Callback):
    """At the end of training: backbone, experts, then the table, its shards shared out over all ranks.

    It runs in `on_train_end`, with the process group alive; an exception or an interrupt never gets here, so an
    unfinished fit leaves no manifest.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        dtype: str = "bfloat16",
        chunk_tokens: int | None = None,
        tokenizer: str | None = None,
        token_counts: Tensor | None = None,
    ) -> None:
        """Write into `run_dir`; other arguments as in `src.lut.build_lut`."""
        self.run_dir, self.dtype, self.chunk_tokens = run_dir, dtype, chunk_tokens
        self.tokenizer, self.token_counts = tokenizer, token_counts

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write everything."""
        assert isinstance(pl_module, LanguageModel)
        run = RunDirectory(trainer.strategy.broadcast(self.run_dir))
        model, rank = pl_module.model, trainer.global_rank
        weights = whole_weights(model, keep=rank == 0)
        if rank == 0:
            run.write_weights(weights)
        del weights
        trainer.strategy.barrier("weights written")
        if model.config.architecture != "mole":
            return
        with progress_bar("building the table (rows)", model.config.vocab_size) as advance:
            build_lut(
                RunRows(run) if is_sharded(model) else ModelRows(model),
                run.lut_path(),
                dtype=self.dtype,
                chunk_tokens=self.chunk_tokens,
                overwrite=True,
                rank=rank,
                world_size=trainer.world_size,
                barrier=trainer.strategy.barrier,
                tokenizer=self.tokenizer,
                token_counts=self.token_counts,
                progress=advance,
            )
