"""Records of Hugging Face datasets, by name on the hub or from a folder in the same layout."""

from collections.abc import Iterator
from itertools import count
from typing import Any

from src.data.config import SourceConfig
from src.data.records import Malformed, Record, text_of
from src.errors import DataError


def read_hub(source: SourceConfig, *, skip: int = 0) -> Iterator[Record]:
    """Yield the records of a hub dataset after the first `skip`.

    Raises:
        DataError: the dataset cannot be had (no network, unknown name, subset or split), or has no such column.
    """
    rows = _open(source)
    columns = rows.column_names  # unknown until the first row for some streams
    if columns is not None and source.text_field not in columns:
        raise DataError(
            f"{source.hub}: has no column {source.text_field!r}, only {', '.join(columns)}; "
            "set text_field to one of them"
        )
    if not source.streaming and skip >= len(rows):  # stored datasets refuse to skip all of themselves
        return
    rest = iter(rows.skip(skip))
    for number in count(skip + 1):
        try:
            row = next(rest)
        except StopIteration:
            return
        except Exception as error:  # the library, its hub client and its readers raise many kinds
            raise DataError(
                f"{source.hub}: reading stopped at row {number:,} ({_kind(error)}); run again, what is done is kept"
            ) from error
        yield _record(row, number, source.text_field)


def hub_rows(source: SourceConfig) -> int | None:
    """Return how many rows the split has, where its description says so; never downloads data."""
    import datasets  # here, not above: it takes seconds to import, and most corpora do not need it

    try:
        splits = datasets.load_dataset_builder(str(source.hub), source.subset, revision=source.revision).info.splits
    except Exception:  # noqa: BLE001 - only the time left depends on it; reading reports what is wrong
        return None
    return splits[source.split].num_examples if splits and source.split in splits else None


def _open(source: SourceConfig) -> Any:  # datasets.Dataset or IterableDataset
    import datasets  # as above

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(
            str(source.hub), source.subset, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except Exception as error:  # the library, its hub client and its readers raise many kinds
        where = f"{source.hub}" + (f" ({source.subset})" if source.subset else "")
        raise DataError(
            f"{where}: split {source.split!r} cannot be had from the Hugging Face hub "
            f"({_kind(error)}); check name, subset, split and network"
        ) from error


def _kind(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _record(row: Any, number: int, text_field: str) -> Record:
    try:
        text = text_of(row, text_field)
    except Malformed as problem:
        return Record(None, problem.problem, number, str(problem), number)
    if not text.strip():
        return Record(text, "empty", number, "no text", number)
    return Record(text, None, number, "", number)
