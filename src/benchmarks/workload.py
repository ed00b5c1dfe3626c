"""What benchmarks work on: real text as ids, runs and tables of random numbers, and the state of the page cache.

Ids come from real text, since repeated requests decide what a cache is worth. Weights are random, since time does not
depend on them. The page cache is set before a measurement, off its clock.

B batch, D hidden, E experts, V vocabulary.
"""

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from src.data.config import SourceConfig
from src.data.corpus import Document, read_source
from src.data.files import source_files
from src.data.tokenizer import load_tokenizer, train_bpe
from src.errors import DataError, UserError, caused_by
from src.lut import build_lut
from src.lut.readers.reader import Reader
from src.model import KeyValueCache, ModelConfig, Transformer
from src.run_directory import Identity, RunDirectory
from src.system.console import progress_bar

HELD_OUT_SHARE = 0.1
PROMPT_TOKENS = 512
"""Read before the steps that are measured."""
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
        """Return the next (num_tokens,) ids of held-out text, in order; at its end start over."""
        if len(self.held_out) < num_tokens:
            raise DataError(f"the held-out text has {len(self.held_out)} tokens, {num_tokens} are needed; give more")
        if self._next + num_tokens > len(self.held_out):
            self._next = 0
        self._next += num_tokens
        return self.held_out[self._next - num_tokens : self._next]

    def streams(self, count: int, num_tokens: int) -> Tensor:
        """Return (count, num_tokens) consecutive ids of held-out text; the sequences start far apart."""
        starts = torch.arange(count) * (len(self.held_out) // count)
        return self.held_out[(starts.unsqueeze(1) + torch.arange(num_tokens)) % len(self.held_out)]

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


def load_text_ids(corpus: Sequence[Path | str], tokenizer: Path | None, vocab_size: int) -> TextIds:
    """Read `corpus` as training reads files, by default the standard library; by default train a BPE on it."""
    loaded = None
    if tokenizer is not None:
        with caused_by("--tokenizer"):
            loaded = load_tokenizer(tokenizer)
    texts = list(read_texts(map(str, corpus), "--corpus"))
    if loaded is not None:
        return TextIds(loaded, texts, vocab_size)
    return TextIds(train_bpe(iter(texts), min(_DEFAULT_VOCABULARY, vocab_size)), texts, vocab_size)


def read_texts(files: Iterable[str] = (), option: str = "--files") -> Iterator[str]:
    """Yield the documents of `files`, by default of the standard library; errors call them `option`."""
    patterns = list(files)
    source = SourceConfig(files=patterns) if patterns else SourceConfig(embedded=True)
    return (item.text for item in read_source(source, source_files(source, option)) if isinstance(item, Document))


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return torch.cat([torch.tensor(encoding.ids, dtype=torch.int64) for encoding in encodings])


class RandomRows:
    """A source of rows for weights of an `identity`: they differ by id and layer and cost almost nothing."""

    rows_from = "random numbers"
    held_row_bytes = 0
    row_ids = None

    def __init__(self, config: ModelConfig, identity: Identity) -> None:
        self.config, self.identity = config, identity

    def layer_rows(self, layer: int, first_token: int, num_tokens: int) -> Tensor:
        """Scale one random (E, D) block per layer by a factor of each id."""
        generator = torch.Generator().manual_seed(layer)
        block = torch.randn(self.config.num_experts, self.config.hidden_size, generator=generator)
        ids = torch.arange(first_token, first_token + num_tokens, dtype=torch.float32)
        return block * (0.5 + ids / self.config.vocab_size)[:, None, None]  # (num_tokens, E, D)


def write_runs(
    directory: Path, config: ModelConfig, dtype: str, token_counts: Tensor | None, *, with_experts: bool = True
) -> tuple[Path, Path]:
    """Write a MoLE run, of both forms or without experts, and a Dense run of its backbone; return their paths."""
    torch.manual_seed(0)
    model = Transformer(config, with_experts=with_experts).to(torch.bfloat16)
    mole, dense = RunDirectory(directory / "mole"), RunDirectory(directory / "dense")
    dense_config = replace(config, num_experts=0, expert_intermediate_size=0)
    weights = model.state_dict()
    kept = set(Transformer(replace(dense_config, vocab_size=1)).state_dict())
    for run, run_config in ((mole, config), (dense, dense_config)):
        run.path.mkdir(parents=True)
        run.write_config({"model": run_config.to_dict()})
    identity = mole.write_weights(weights)
    dense.write_weights({name: tensor for name, tensor in weights.items() if name in kept})
    source = RandomRows(config, identity)
    build_lut(source, mole.lut_path(), dtype=dtype, token_counts=token_counts, progress=progress_bar)
    return mole.path, dense.path


@torch.inference_mode()
def decode_step(model: Transformer, token_ids: Tensor, cache: KeyValueCache) -> float:
    """Take one step of (B,) sampled ids on the CPU: request their rows, run the model, sample; return its seconds."""
    start = time.perf_counter()
    new_ids = token_ids.unsqueeze(1)  # (B, 1)
    expert_rows = model.expert_rows(new_ids)
    hidden_states = model.trunk(new_ids, cache=cache, expert_rows=expert_rows).hidden_states
    model.head(hidden_states[:, -1]).max(dim=-1).indices.cpu()  # the only wait for a device, as in `Sampler`
    return time.perf_counter() - start


@contextmanager
def scratch_directory(parent: Path) -> Generator[Path]:
    """Yield an empty directory under `parent`, removed afterwards; it must be on the disk that is measured."""
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="benchmark-", dir=parent) as directory:
        yield Path(directory)


def drop(lut_dir: Path, release: Iterable[Callable[[], None]] = ()) -> None:
    """Take the table's files out of the page cache, so that the next read is cold.

    `release` are called first: pages that a memory map of this process has touched cannot be dropped.
    """
    if not hasattr(os, "posix_fadvise"):
        raise UserError("cold reads can only be measured where posix_fadvise exists (Linux)")
    for unmap in release:
        unmap()
    for path in sorted(lut_dir.glob("rows-*")):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bytes_read() -> int:
    """Return the bytes that this process has read from disk so far; 0 if the system does not count them."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


class BareReads:
    """A reader alone: without a store's requests, checksums, cache and statistics."""

    def __init__(self, reader: Reader, row_bytes: int, capacity: int) -> None:
        self._reader, self._rows = reader, np.ones((capacity, row_bytes), dtype=np.uint8)

    def __call__(self, token_ids: Tensor) -> None:
        wanted = [(token_id, position) for position, token_id in enumerate(token_ids.tolist())]
        finish = self._reader.start(wanted, self._rows, lambda _token_id, _position: None)
        if finish is not None:
            finish()
