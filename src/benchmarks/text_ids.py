"""Token ids from real text: which rows a request wants, and which it wants again, is what a cache lives on."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from src.data.files import stdlib_files
from src.data.tokenizer import load_tokenizer, train_bpe
from src.errors import DataError

HELD_OUT_SHARE = 0.1
_DEFAULT_VOCABULARY = 16_384


class TextIds:
    """A corpus as ids: counts of its first part, for seeding a cache, and its last part, to draw requests from."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], vocab_size: int) -> None:
        """Tokenize; the end of every text is held out."""
        cuts = [int(len(text) * (1 - HELD_OUT_SHARE)) for text in texts]
        seen = _encode(tokenizer, [text[:cut] for text, cut in zip(texts, cuts, strict=True)])
        self.held_out = _encode(tokenizer, [text[cut:] for text, cut in zip(texts, cuts, strict=True)])  # (N,)
        if (largest := int(torch.cat([seen, self.held_out]).max())) >= vocab_size:
            raise DataError(f"the tokenizer has id {largest}, but the shape's vocabulary holds {vocab_size}")
        self.counts = torch.bincount(seen, minlength=vocab_size)  # (V,)
        self._next = 0

    def window(self, num_tokens: int) -> Tensor:
        """Return the next (num_tokens,) ids of held-out text as they stand, from the start again at its end."""
        if len(self.held_out) < num_tokens:
            raise DataError(f"the held-out text has {len(self.held_out)} tokens, {num_tokens} are needed; give more")
        if self._next + num_tokens > len(self.held_out):
            self._next = 0
        self._next += num_tokens
        return self.held_out[self._next - num_tokens : self._next]

    def distinct(self, count: int) -> Tensor:
        """Return the next (count,) ids of held-out text without repetition, in the order of the text."""
        found: dict[int, None] = {}
        windows = 0
        while len(found) < count:
            found |= dict.fromkeys(self.window(min(count, len(self.held_out))).tolist())
            if (windows := windows + 1) > 1000:
                raise DataError(f"the held-out text has fewer than {count} distinct tokens; give a larger --corpus")
        ids = torch.tensor(list(found)[:count])
        require_distinct(ids)
        return ids


def require_distinct(token_ids: Tensor) -> None:
    """Refuse a request that repeats a token: its second read would be warm, or free."""
    if len(token_ids.unique()) != len(token_ids):
        raise DataError("a measured request repeats a token, so part of it would cost nothing; draw other ids")


def load_text_ids(corpus: Sequence[Path], tokenizer: Path | None, vocab_size: int) -> TextIds:
    """Read `corpus` (text, or text.gz), by default the standard library; by default train a BPE on it."""
    texts = [_read(path) for path in corpus or stdlib_files()]
    if tokenizer is not None:
        return TextIds(load_tokenizer(tokenizer), texts, vocab_size)
    return TextIds(train_bpe(iter(texts), min(_DEFAULT_VOCABULARY, vocab_size)), texts, vocab_size)


def _read(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); give text files, or .gz of them") from error


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return torch.cat([torch.tensor(encoding.ids, dtype=torch.int64) for encoding in encodings])
