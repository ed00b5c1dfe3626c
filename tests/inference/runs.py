"""A small random run with a float32 table, whose forms must agree."""

from pathlib import Path

import torch

from src.lut import build_lut
from src.model import ModelConfig, Transformer
from src.run_directory import RunDirectory

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    intermediate_size=48,
    num_experts=4,
    expert_intermediate_size=40,
    max_sequence_length=64,
    init_std=0.3,
)


def write_run(path: Path, *, dtype: str = "float32", seed: int = 0, config: ModelConfig = CONFIG) -> Path:
    """Write weights and table of a random model; norms are random too, or a wrong layer's would not show."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    if model.has_row is not None:
        model.has_row[::3] = True
    run = RunDirectory(path)
    path.mkdir(parents=True, exist_ok=True)
    run.write_config({"model": config.to_dict()})
    run.write_weights(model.state_dict())
    if config.architecture == "mole":
        build_lut(run, run.lut_path(), dtype=dtype, token_counts=torch.arange(97))
    return path


def prompts(count: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random prompts (B, T)."""
    return torch.randint(97, (count, tokens), generator=torch.Generator().manual_seed(seed))
