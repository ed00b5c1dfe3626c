"""What text a model is trained on, and how it is cut into windows."""

import re
from dataclasses import dataclass, field

from src.errors import MAX_FLOAT32, ConfigError, check_range


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer turns text into ids: a file, one from the Hugging Face hub, or one trained here."""

    path: str | None = None
    """A `tokenizer.json` of the `tokenizers` library."""
    hub: str | None = None
    """A tokenizer's name on the Hugging Face hub, such as EleutherAI/gpt-neox-20b; fetched once, then kept."""
    separator: str | None = None
    """The token that ends documents; null is the first usual one that the tokenizer has, such as <|endoftext|> or </s>.
    Only a tokenizer that is trained here is given it."""
    vocab_size: int = 4096
    """Entries of the byte-level BPE trained on the training documents when neither `path` nor `hub` is given, at least
    257 (every byte and the document separator)."""
    training_mb: int = 64
    """Most text that the BPE is trained on, in MB; a larger corpus gives an equal share from each of its files."""

    def __post_init__(self) -> None:
        if self.path is not None and self.hub is not None:
            raise ConfigError(
                f"data.tokenizer: path ({self.path!r}) and hub ({self.hub!r}) name two tokenizers; set one to null"
            )
        if self.is_trained_here and self.vocab_size < 257:
            raise ConfigError(
                f"data.tokenizer.vocab_size: {self.vocab_size}, but a byte-level vocabulary needs at least 257 "
                "(256 bytes and the document separator); raise it, or model.vocab_size where it takes that value"
            )
        if self.is_trained_here and self.separator is not None and len(self.separator) < 2:
            raise ConfigError(
                f"data.tokenizer.separator: {self.separator!r} is part of ordinary text; name a token of at least 2 "
                "characters, such as </s>"
            )
        check_range(self, "data.tokenizer.", ("training_mb",), at_least=1)

    @property
    def is_trained_here(self) -> bool:
        """Whether the tokenizer is made from the corpus."""
        return self.path is None and self.hub is None


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One corpus: exactly one of `files`, `hub` and `embedded`."""

    name: str | None = None
    """How reports call it; null is its first pattern or its name on the hub."""
    embedded: bool = False
    """The source files of the running Python's standard library, about 11 MB of text."""
    files: list[str] = field(default_factory=list[str])
    """Paths, folders and globs; what exists as a path is no glob. By ending: .jsonl, .json (an array, or one object a
    line), .parquet; other text is one document a file. Each may be compressed: .gz, .zst, .bz2, .xz."""
    hub: str | None = None
    """A dataset's name on the Hugging Face hub, or a folder in the same layout."""
    subset: str | None = None
    """The hub dataset's configuration, such as sample-10BT."""
    split: str = "train"
    """The hub dataset's split to read; held-out documents are chosen from it by `data.validation_fraction`."""
    revision: str | None = None
    """Branch, tag or commit on the hub. Only a commit pins the text; later changes to a branch are not noticed."""
    streaming: bool = False
    """Read the hub dataset as it downloads instead of storing it first; resuming after an interruption then downloads
    again what was done, without tokenizing it."""
    text_field: str = "text"
    """The key or column that holds a document's text."""
    document_start: str | None = None
    """A regular expression found at the start of a document's first row or line; the rows up to the next such one are
    joined. null: each row, or whole text file, is a document."""
    weight: float | None = None
    """Share of training windows relative to the other sources' weights; give it to all sources or to none. Without
    weights an epoch holds every window of every source once."""

    def __post_init__(self) -> None:
        named = [name for name in ("embedded", "files", "hub") if getattr(self, name)]
        if len(named) != 1:
            found = " and ".join(named) or "none of them"
            raise ConfigError(f"data.sources: a source must name one of embedded, files and hub, but {found} is set")
        if self.weight is not None and not 0 < self.weight <= MAX_FLOAT32:
            raise ConfigError(f"data.sources: {self.label} has weight {self.weight}, but it must be above 0 and finite")
        try:
            re.compile(self.document_start or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(
                f"data.sources: {self.label} has document_start {self.document_start!r}, which is no regular "
                f"expression ({error})"
            ) from error

    @property
    def label(self) -> str:
        """The name that reports and messages use."""
        return self.name or self.hub or (self.files[0] if self.files else "embedded")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpus, tokenizer and windows."""

    files: list[str] = field(default_factory=list[str])
    """The simple way to name a corpus: paths, folders and globs of one source (see `sources`). With both empty the
    corpus is the running Python's standard library."""
    sources: list[SourceConfig] = field(default_factory=list[SourceConfig])
    """Several corpora, or one that needs more than `files`. Each has one of embedded, files and hub (that with subset,
    split, revision, streaming), and may have name, text_field, document_start and weight, its share of windows."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    sequence_length: int = 256
    """T: tokens per window."""
    global_batch_size: int = 16
    """Windows per optimizer step, over all devices."""
    micro_batch_size: int = 16
    """The most windows that a device takes at a time. It accumulates its share of the global batch in equal
    micro-batches, as large as that allows."""
    document_mask: bool = False
    """Hide the other documents of a packed window from attention, in training and wherever its text is scored."""
    validation_fraction: float = 0.05
    """Share of documents held out, chosen by a hash of their content; above 0 and below 1. Where documents are too few
    for that, this much at the end of each (more in short ones) is held out."""
    validation_windows: int = 128
    """Held-out windows that each evaluation during training scores, the same each time; fewer if there are fewer."""
    seed: int = 0
    """Decides which documents are held out and the order of windows; at least 0."""
    shuffle_seed: int | None = None
    """Decides the order of windows alone, so that runs in different orders have the same held-out text; null is
    `seed`."""
    max_malformed_fraction: float = 0.001
    """Share of a source's records that may be skipped because they are not UTF-8, hold NUL bytes, are not JSON or lack
    their text."""
    max_empty_fraction: float = 0.5
    """Share of a source's records that may be skipped because they hold no text."""
    duplicate_memory_mb: int = 256
    """Memory for the hashes that find duplicate documents, in MB (10 million documents at 256); once it is full, later
    documents are compared only with the remembered ones, and the report counts them."""
    prepare_processes: int | None = None
    """Processes that tokenize; null is one per usable core."""
    shard_mb: int = 64
    """Text per shard of the token cache, in MB; an interruption loses at most one shard of work."""
    num_workers: int = 0
    """Extra processes that prepare batches; 0 does it in the training process."""
    cache_dir: str = ".cache/data"
    """Where tokenized corpora are kept between runs."""

    def __post_init__(self) -> None:
        self._require_sources()
        sizes = ("sequence_length", "global_batch_size", "micro_batch_size", "validation_windows")
        resources = ("duplicate_memory_mb", "prepare_processes", "shard_mb")
        check_range(self, "data.", (*sizes, *resources), at_least=1)
        check_range(self, "data.", ("seed", "shuffle_seed"), at_least=0)
        check_range(self, "data.", ("prepare_processes", "num_workers"), at_least=0, at_most=4096)
        check_range(self, "data.", ("validation_fraction",), above=0, below=1)
        check_range(self, "data.", ("max_malformed_fraction", "max_empty_fraction"), at_least=0, at_most=1)

    @property
    def files_key(self) -> str:
        """The key that names the files."""
        return "data.sources" if self.sources else "data.files"

    def all_sources(self) -> list[SourceConfig]:
        """Return what is read: `sources`, or `files` as one source, or the embedded corpus."""
        if self.sources:
            return list(self.sources)
        return [SourceConfig(files=list(self.files)) if self.files else SourceConfig(name="embedded", embedded=True)]

    def micro_batch_windows(self, world_size: int) -> int:
        """Windows that each of `world_size` devices takes at a time.

        That is the largest divisor of a device's share of the global batch that is at most `micro_batch_size`.

        Raises:
            ConfigError: the devices do not divide the global batch.
        """
        share, rest = divmod(self.global_batch_size, world_size)
        if rest:
            raise ConfigError(
                f"data.global_batch_size: {self.global_batch_size} windows cannot be shared equally by {world_size} "
                "devices (trainer.devices x trainer.num_nodes); change one of them, such as "
                f"data.global_batch_size={(share + 1) * world_size}"
            )
        return next(size for size in range(min(self.micro_batch_size, share), 0, -1) if share % size == 0)

    def micro_batches_per_step(self, world_size: int) -> int:
        """Micro-batches that each of `world_size` devices accumulates per optimizer step; raises as the above does."""
        return self.global_batch_size // (world_size * self.micro_batch_windows(world_size))

    def _require_sources(self) -> None:
        if self.files and self.sources:
            raise ConfigError("data.files and data.sources are both set; move the files into a source of their own")
        weighted = [source.label for source in self.sources if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            missing = next(source.label for source in self.sources if source.weight is None)
            raise ConfigError(
                f"data.sources: {weighted[0]} has a weight and {missing} has none; give it to all or none"
            )
