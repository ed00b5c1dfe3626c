"""Folders of random models that transformers writes, one or more of each family; skips where it is not installed."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, processors
from torch import Tensor, nn

from src.data.tokenizer import train_bpe

transformers: Any = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 12, "rope_parameters": LLAMA3}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-each-head": ("llama", {"num_key_value_heads": 4, "hidden_size": 40}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 6}),
    "mistral-tied": ("mistral", {"sliding_window": 64, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": True, "max_window_layers": 3}),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3-tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
}
"""By name: model_type, and what differs from `SIZES`."""


def random_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model with transformers' own initial weights; norms and biases are random."""
    model_type, values = FAMILIES[name]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **values})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in cast(nn.Module, model).parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def words(vocab_size: int = 300) -> Tokenizer:
    """Return a small byte-level BPE, whose id 0 ends documents."""
    return train_bpe(iter(["a table of words, and the words of a table; one table after another"] * 9), vocab_size)


def write_folder(
    directory: Path, model: Any, *, shard_size: str = "5GB", begins_with: str | None = None, **tokenizer: Any
) -> Path:
    """Write model and tokenizer, which puts the token `begins_with` before a text if it is given."""
    model.save_pretrained(directory, max_shard_size=shard_size)
    own = words()
    if begins_with is not None:
        own.add_special_tokens([begins_with])
        token = (begins_with, own.token_to_id(begins_with))
        own.post_processor = processors.TemplateProcessing(
            single=f"{begins_with} $A", pair=f"{begins_with} $A {begins_with} $B", special_tokens=[token]
        )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|endoftext|>", **tokenizer)
    fast.save_pretrained(directory)
    return directory


def padded_batch(seed: int, lengths: tuple[int, ...] = (40, 19, 6)) -> tuple[Tensor, Tensor]:
    """Return ids (B, T) with padding on the left, and booleans that are False there."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    token_ids = torch.randint(1, SIZES["vocab_size"], (len(lengths), longest), generator=generator)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths).unsqueeze(1)
    return token_ids.masked_fill(~mask, 0), mask


@torch.no_grad()
def logits_of(model: Any, token_ids: Tensor, mask: Tensor) -> Tensor:
    """Return what transformers computes."""
    return model(input_ids=token_ids, attention_mask=mask.long()).logits
