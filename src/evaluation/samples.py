"""Text that a model writes, for people to look at."""

import torch
from tokenizers import Tokenizer

from src.evaluation.config import EvaluationConfig
from src.inference import generate
from src.model import Transformer


def sample_text(model: Transformer, tokenizer: Tokenizer, config: EvaluationConfig) -> str | None:
    """Continue `config.sample_prompt`, always with the same seed; None where no sample is wanted."""
    if not config.sample_prompt or not config.sample_tokens:
        return None
    device = model.embedding.weight.device
    prompt = torch.tensor(
        [tokenizer.encode(config.sample_prompt, add_special_tokens=False).ids], device=device
    )  # (1, T)
    room = model.config.max_sequence_length - prompt.shape[1]
    continued = generate(
        model,
        prompt,
        max_new_tokens=min(config.sample_tokens, room),
        temperature=config.sample_temperature,
        seed=0,
    )
    return tokenizer.decode(continued[0].tolist())
