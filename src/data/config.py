"""What text a model is trained on, and how it is cut into windows."""

from dataclasses import dataclass, field

from src.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer turns text into ids."""

    path: str | None = None
    """A `tokenizer.json` of the `tokenizers` library; null trains a byte-level BPE on the training documents."""
    vocab_size: int = 4096
    """Entries of the BPE trained here, at least 257 (every byte and the document separator); unused with `path`."""

    def __post_init__(self) -> None:
        """Raise ConfigError when the vocabulary cannot hold every byte."""
        if self.path is None and self.vocab_size < 257:
            raise ConfigError(
                f"data.tokenizer.vocab_size: {self.vocab_size}, but a byte-level vocabulary needs at least 257 "
                "(256 bytes and the document separator)"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpus, tokenizer and windows."""

    files: list[str] = field(default_factory=list[str])
    """Text files, one document each; globs are expanded. Empty uses the running Python's standard library sources."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    sequence_length: int = 256
    """T: tokens per window."""
    global_batch_size: int = 16
    """Windows per optimiser step, over all devices."""
    micro_batch_size: int = 16
    """Windows per forward pass on one device; the rest of the global batch is accumulated."""
    validation_fraction: float = 0.05
    """Share of documents held out, chosen by a hash of their content; above 0 and below 1."""
    validation_windows: int = 128
    """Held-out windows that a validation looks at, the same each time; fewer if the split has fewer."""
    seed: int = 0
    """Decides the split and the order of windows."""
    num_workers: int = 0
    """Processes that prepare batches beside training; 0 does it in the training process."""
    cache_dir: str = ".cache/data"
    """Where tokenized corpora are kept between runs."""

    def __post_init__(self) -> None:
        """Raise ConfigError on values out of range."""
        for name in ("sequence_length", "global_batch_size", "micro_batch_size", "validation_windows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name}: {getattr(self, name)}, but it must be at least 1")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"data.validation_fraction: {self.validation_fraction}, but it must lie between 0 and 1")
        if self.num_workers < 0:
            raise ConfigError(f"data.num_workers: {self.num_workers}, but it must not be negative")
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                f"data.global_batch_size: {self.global_batch_size} is not a multiple of data.micro_batch_size "
                f"({self.micro_batch_size}); change one of them"
            )

    def micro_batches_per_step(self, world_size: int) -> int:
        """Forward passes that each of `world_size` devices makes per optimiser step."""
        count, rest = divmod(self.global_batch_size, self.micro_batch_size * world_size)
        if rest:
            raise ConfigError(
                f"data.global_batch_size: {self.global_batch_size} is not a multiple of data.micro_batch_size "
                f"({self.micro_batch_size}) x {world_size} devices; change one of them"
            )
        return count
