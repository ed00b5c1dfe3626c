"""The tokenizer of a run, bound to what was made with it: its model's training text and its tables."""

import json
from collections.abc import Iterator
from contextlib import suppress

from tokenizers import Tokenizer

from src.data.tokenizer import fingerprint, load_tokenizer, require_same
from src.errors import LutError
from src.lut.manifest import MANIFEST_NAME, read_manifest
from src.run_directory import RunDirectory


def load_run_tokenizer(run: RunDirectory) -> Tokenizer:
    """Load `tokenizer.json` of a run.

    Raises:
        DataError: it is missing or unreadable, or the run's model or one of its tables was made with another one.
    """
    tokenizer = load_tokenizer(run.tokenizer_path)
    for recorded, where in _recorded(run):
        require_same(recorded, where, fingerprint(tokenizer), str(run.tokenizer_path))
    return tokenizer


def _recorded(run: RunDirectory) -> Iterator[tuple[str | None, str]]:
    if run.report_path.is_file():
        report = json.loads(run.report_path.read_text(encoding="utf-8"))
        yield report.get("corpus", {}).get("tokenizer"), f"{run.path} (as its {run.report_path.name} says)"
    for path in sorted(run.path.glob(f"*/{MANIFEST_NAME}")):
        with suppress(LutError):  # opening the table will say what is wrong with it
            yield read_manifest(path.parent).tokenizer, str(path.parent)
