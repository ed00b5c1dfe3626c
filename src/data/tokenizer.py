"""Tokenizers of the `tokenizers` library: trained here or loaded, fingerprinted, measured in bytes."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from src.errors import DataError

END_OF_TEXT = "<|endoftext|>"
"""Separates documents, as in GPT-NeoX's vocabulary."""
_METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece vocabularies write for a space."""


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; any text can be encoded, and id 0 separates documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.json`; DataError when it is missing, unreadable or has no document separator."""
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer file; give the path of a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path}: not a tokenizer.json of the `tokenizers` library ({error})") from error
    return _with_separator(tokenizer, str(path))


def load_bound_tokenizer(path: Path, recorded: Mapping[str, str]) -> Tokenizer:
    """Load the tokenizer of a run.

    Args:
        path: its `tokenizer.json`.
        recorded: fingerprints of the tokenizers that its model and tables were made with, by where they are recorded.

    Raises:
        DataError: the file is missing or unreadable, or something was made with another tokenizer.
    """
    tokenizer = load_tokenizer(path)
    for where, found in recorded.items():
        require_same(found, where, fingerprint(tokenizer), str(path))
    return tokenizer


def load_hub_tokenizer(name: str) -> Tokenizer:
    """Fetch a tokenizer from the Hugging Face hub, or from its cache; DataError when that fails."""
    try:
        tokenizer = Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises bare Exception
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"data.tokenizer.hub: {name!r} cannot be had from the Hugging Face hub ({reason}); check name and "
            "network, or set data.tokenizer.path to a tokenizer.json"
        ) from error
    return _with_separator(tokenizer, name)


def separator_id(tokenizer: Tokenizer) -> int:
    """Return the id that ends each document."""
    found = tokenizer.token_to_id(END_OF_TEXT)
    assert found is not None, "loading has checked this"
    return found


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's own JSON: binds data, model and table to one vocabulary."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Number of ids a model needs: the largest id plus one."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def require_room(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise DataError when the tokenizer has ids that a model of `vocab_size` lacks."""
    if (size := vocabulary_size(tokenizer)) > vocab_size:
        raise DataError(
            f"model.vocab_size: {vocab_size}, but the tokenizer has {size} ids; set model.vocab_size={size} or more"
        )


def require_same(found: str | None, found_at: str, expected: str | None, expected_at: str) -> None:
    """Raise DataError when two fingerprints differ, naming where each comes from; an unknown one (None) passes."""
    if found is not None and expected is not None and found != expected:
        raise DataError(
            f"{found_at}: made with tokenizer {found[:12]}, but {expected_at} has tokenizer {expected[:12]}; "
            "their ids mean different text, so use the two that belong together"
        )


def byte_lengths(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Return (V,) int64: UTF-8 bytes of text that each id stands for; 0 for special tokens and padding ids."""
    lengths = torch.zeros(vocab_size, dtype=torch.int64)
    added, kinds = tokenizer.get_added_tokens_decoder(), _decoder_kinds(json.loads(tokenizer.to_str())["decoder"])
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if token_id not in added:
            lengths[token_id] = _num_bytes(token, kinds)
        elif not added[token_id].special:
            lengths[token_id] = len(token.encode())
    return lengths


def _decoder_kinds(decoder: Any) -> set[str]:
    """Return the types of a decoder, and of those it is made of, in a tokenizer's JSON."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_kinds(part) for part in decoder.get("decoders", ())))


def _num_bytes(token: str, kinds: set[str]) -> int:
    """Count the bytes of text that a token of the vocabulary stands for, as its kind of decoder writes it."""
    if "ByteLevel" in kinds:
        return len(token)  # one character of the vocabulary is one byte
    if "ByteFallback" in kinds and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return 1
    if "WordPiece" in kinds:
        return len(token[2:].encode()) if token.startswith("##") else len(token.encode()) + 1  # and a space
    return len(token.replace(_METASPACE, " ").encode())


def _with_separator(tokenizer: Tokenizer, where: str) -> Tokenizer:
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise DataError(f"{where}: has no {END_OF_TEXT} token to separate documents; add it to the tokenizer")
    tokenizer.no_truncation()  # a tokenizer.json may carry limits of the model it was made for
    tokenizer.no_padding()
    return tokenizer
