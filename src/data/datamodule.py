"""Lightning's view of a packed corpus. One training batch is what one device needs for one optimizer step.

A micro-batches of a step, B windows of a micro-batch, N windows, T tokens of a window.
"""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from src.data.config import DataConfig
from src.data.packed_corpus import PackedCorpus
from src.data.windows import PADDED_IDS, Mixture, Per, find_distinct
from src.system.signals import ignore_stop_signals

NO_WINDOW = -1
"""Token id that fills padding windows."""


class StepSampler(Sampler[int]):
    """Counts optimizer steps from `first_step` without end: the whole position in the data is one integer."""

    def __init__(self, first_step: int) -> None:
        self.first_step = first_step

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first_step)


class StepWindows(Dataset[Tensor]):
    """Item `step` is (A, B, T+1): the A micro-batches of B windows that `rank` accumulates in that step.

    Global micro-batch a * world_size + rank goes to `rank` as its a-th, so ranks are disjoint, and a step holds the
    same windows whatever the number of devices and the size of their micro-batches.
    """

    def __init__(self, corpus: PackedCorpus, config: DataConfig, rank: int, world_size: int) -> None:
        seed = config.seed if config.shuffle_seed is None else config.shuffle_seed
        self.mixture = Mixture(corpus.training_streams(), config.sequence_length, seed)
        self.config = config
        self.rank, self.world_size = rank, world_size
        self.size = config.micro_batch_windows(world_size)
        self.micro_batches = config.micro_batches_per_step(world_size)

    def samples(self, step: int) -> NDArray[np.int64]:
        """Return the sample numbers (A, B) of one step: places in the endless shuffled stream of windows."""
        first = step * self.config.global_batch_size + self.rank * self.size
        starts = first + np.arange(self.micro_batches, dtype=np.int64) * self.world_size * self.size  # (A,)
        return starts[:, None] + np.arange(self.size)

    def __getitem__(self, step: int) -> Tensor:
        samples = self.samples(step).reshape(-1)  # (A*B,)
        return self.mixture.windows(samples).view(self.micro_batches, self.size, -1)  # (A, B, T+1)


class PackedDataModule(lightning.LightningDataModule):
    """Training steps and held-out batches of a `PackedCorpus`, for this process's rank."""

    def __init__(
        self, corpus: PackedCorpus, config: DataConfig, held_out: Tensor, distinct_per: Per | None = None
    ) -> None:
        """Serve training steps as `config` says, and `held_out` windows (N, T+1) int64."""
        super().__init__()
        self.corpus, self.config, self.held_out = corpus, config, held_out
        self.distinct_per: Per | None = distinct_per

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Endless steps as `StepBatch`, from the trainer's current one."""
        trainer = self.trainer
        assert trainer is not None
        multiple = PADDED_IDS if _is_copied(trainer) else 1
        collate: Any = partial(find_distinct, per=self.distinct_per, multiple=multiple)
        return DataLoader(
            StepWindows(self.corpus, self.config, trainer.global_rank, trainer.world_size),
            batch_size=None,
            collate_fn=collate,
            sampler=StepSampler(trainer.global_step),
            num_workers=self.config.num_workers,
            pin_memory=_is_copied(trainer),
            persistent_workers=self.config.num_workers > 0,
            worker_init_fn=ignore_stop_signals,
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        """This rank's share of the held-out windows, in batches (B, T+1).

        Every rank gets the same number, because sharded models compute in lockstep; windows of `NO_WINDOW` are padding.
        """
        trainer = self.trainer
        assert trainer is not None
        windows = self.held_out[trainer.global_rank :: trainer.world_size]
        missing = math.ceil(len(self.held_out) / trainer.world_size) - len(windows)
        filled = torch.cat([windows, windows.new_full((missing, self.held_out.shape[1]), NO_WINDOW)])
        size = self.config.micro_batch_windows(trainer.world_size)
        return DataLoader(_Windows(filled), batch_size=size, pin_memory=_is_copied(trainer))


def _is_copied(trainer: lightning.Trainer) -> bool:
    """Whether batches are copied to a GPU, which page-locked memory lets happen while it computes."""
    return trainer.strategy.root_device.type == "cuda"


class _Windows(Dataset[Tensor]):
    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        return self.windows[index]
