"""Runs and tables of random numbers in the real format: what takes time does not depend on what was learned.

E experts, D hidden.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from src.cli import progress_bar
from src.lut import builder
from src.model import ModelConfig, Transformer
from src.run_directory import Identity, RunDirectory


class RandomRows:
    """A source of rows that differ from id to id and layer to layer, at the speed of memory."""

    rows_from = "random numbers"
    held_row_bytes = 0

    def __init__(self, config: ModelConfig, identity: Identity) -> None:
        """Stand for the weights with that identity."""
        self.config, self.identity = config, identity

    def layer_rows(self, layer: int, first_token: int, num_tokens: int) -> Tensor:
        """Scale one random (E, D) block per layer by a factor of each id."""
        generator = torch.Generator().manual_seed(layer)
        block = torch.randn(self.config.num_experts, self.config.hidden_size, generator=generator)
        ids = torch.arange(first_token, first_token + num_tokens, dtype=torch.float32)
        return block * (0.5 + ids / self.config.vocab_size)[:, None, None]  # (num_tokens, E, D)


def write_table(
    lut_dir: Path, config: ModelConfig, identity: Identity, dtype: str, token_counts: Tensor | None = None
) -> None:
    """Write a table of random rows with the builder of real ones."""
    plan = builder.plan(RandomRows(config, identity), lut_dir, dtype=dtype, token_counts=token_counts)
    builder.prepare(plan)
    with progress_bar("writing the table (rows)", config.vocab_size) as advance:
        builder.write_shards(plan, progress=advance)
    builder.publish(plan)


def write_runs(directory: Path, config: ModelConfig, dtype: str, token_counts: Tensor | None) -> tuple[Path, Path]:
    """Write a MoLE run with weights of both forms, and a Dense run of its backbone; return their paths."""
    torch.manual_seed(0)
    model = Transformer(config).to(torch.bfloat16)
    mole, dense = RunDirectory(directory / "mole"), RunDirectory(directory / "dense")
    dense_config = replace(config, num_experts=0, expert_intermediate_size=0)
    weights = model.state_dict()
    kept = set(Transformer(replace(dense_config, vocab_size=1)).state_dict())
    for run, run_config in ((mole, config), (dense, dense_config)):
        run.path.mkdir(parents=True)
        run.write_config({"model": run_config.to_dict()})
    identity = mole.write_weights(weights)
    dense.write_weights({name: tensor for name, tensor in weights.items() if name in kept})
    write_table(mole.lut_path(), config, identity, dtype, token_counts)
    return mole.path, dense.path


@contextmanager
def scratch_directory(parent: Path) -> Generator[Path]:
    """Yield an empty directory under `parent`, removed afterwards; it must lie on the disk that is measured."""
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="benchmark-", dir=parent) as directory:
        yield Path(directory)
