"""lm-eval's tasks, tags and groups by name: their definitions, their data, and what one needs that is missing.

Like `harness`, this imports lm-eval, which takes seconds: import it inside functions. Scores nothing itself.
"""

import contextlib
import functools
import io
import logging
import re
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lm_eval  # pyright: ignore[reportMissingImports] - an extra
import yaml
from datasets import Dataset
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.defaults import DEFAULT_OTHER_SEED  # pyright: ignore[reportMissingImports]
from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

from src.errors import ConfigError, DataError, UserError, causes
from src.evaluation.tasks import TASKS, PublishedTask, find_rows, read_rows, unknown_task
from src.system.console import print_note, progress_bar

LoadedTask = dict[str, Any]
"""What a name stands for, as lm-eval loads it: its tasks and groups."""
REHEARSED_DOCUMENTS = 2
_FOR_CHAT = re.compile(r"(?:^|_)(?:chat|llama|instruct)(?:_|$)")
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def load_task(task: PublishedTask, local_data: Path | None) -> LoadedTask:
    """Load a task, or all tasks of a tag or group, with their data from a folder or from the Hugging Face hub.

    Of a tag or group, tasks without a file in the folder are left out, with a note.

    Raises:
        ConfigError: the name is unknown, or the task needs something that is missing here.
        DataError: a file in `local_data` is missing or is not the task's.
    """
    _quiet()
    index = _library(task.folder).task_index
    if task.name not in index:  # a word of a definition, but no name
        raise unknown_task(task.name, index)
    with tempfile.TemporaryDirectory() as folder, _explained(task.name, local_data):
        definitions = Definitions(index, Path(folder), local_data, task.num_fewshot)
        definitions.require(task.name)
        manager: Any = TaskManager(include_path=folder, include_defaults=False)
        loaded = manager.load([task.name])
        definitions.print_notes()
        for each in loaded["tasks"].values():
            each.set_config("num_fewshot", definitions.shots(each.get_config("num_fewshot")))
            _require_text(
                each.task_name,
                {"unsafe_code": hasattr(each, "UNSAFE_CODE"), "doc_to_image": hasattr(each, "MULTIMODAL")},
            )
        _rehearse(loaded)
    return loaded


def _quiet() -> None:
    """Have lm-eval print nothing: what matters is in our errors and notes."""
    logger = logging.getLogger("lm_eval")
    logger.setLevel(logging.ERROR)
    logger.propagate = False


@functools.cache
def _library(folder: str | None) -> Any:
    """Return lm-eval's index of a folder of definitions, or of all of them."""
    tasks = Path(str(lm_eval.__file__)).parent / "tasks"
    if folder is not None:
        return TaskManager(include_path=str(tasks / folder), include_defaults=False)
    with progress_bar("reading the definitions of lm-eval's tasks", 1, transient=True) as advance:
        manager = TaskManager()
        advance(1)
    return manager


@dataclass
class Definitions:
    """Writes definitions that include lm-eval's own, and name where the data is, into a folder of their own."""

    index: Mapping[str, Any]
    """lm-eval's definition by name."""
    folder: Path
    local_data: Path | None
    num_fewshot: int | None
    missing: dict[str, DataError] = field(default_factory=dict[str, DataError])
    """Tasks whose data is not in the folder."""
    written: list[str] = field(default_factory=list[str])
    without_examples: list[str] = field(default_factory=list[str])

    def require(self, name: str) -> None:
        """Write the definition of `name` and of all that it consists of; DataError if no data is there."""
        if not self._write(name, {}):
            raise next(iter(self.missing.values()))

    def print_notes(self) -> None:
        if self.missing:
            count = len(self.missing) + len(self.written)
            missing = f"{len(self.missing)} of {count} tasks, which are left out: {_listed(list(self.missing))}"
            print_note(f"{self.local_data} has no files of {missing}")
        if self.without_examples:
            print_note(f"scored without examples, as lm-eval defines it: {_listed(self.without_examples)}")
        if chat := [name for name in self.written if _FOR_CHAT.search(name)]:
            print_note(f"written for chat models, but scored without a chat template: {_listed(chat)}")

    def shots(self, defined: int | None) -> int:
        """Return how many examples a task gets: none where its definition says 0, as in lm-eval."""
        return defined or 0 if self.num_fewshot is None or defined == 0 else self.num_fewshot

    def _write(self, name: str, overrides: dict[str, Any]) -> bool:
        """Write what is needed for `name`; whether there is data for any of it."""
        entry = self.index[name]
        match entry.kind.name:
            case "TAG":
                return sum([self._write(member, overrides) for member in sorted(entry.tags)]) > 0  # writes all of them
            case "GROUP":
                members = list(self._members(entry.cfg["task"], overrides))
                return bool(members) and self._dump(name, {"include": str(entry.yaml_path), "task": members})
            case _:
                definition = {"include": str(entry.yaml_path), "task": name}
                data = self._data(name, {**entry.cfg, **overrides})
                return data is not None and self._dump(name, definition | data)

    def _members(self, members: Sequence[Any], overrides: dict[str, Any]) -> Iterator[Any]:
        """Yield the members of a group that have data: names, names with overrides, and groups inside of it."""
        for member in members:
            if isinstance(member, str):
                if self._write(member, overrides):
                    yield member
            elif (name := member.get("group", member.get("task"))) in self.index:
                if self._write(name, {**overrides, **member}):
                    yield member
            elif inner := list(self._members(member["task"], overrides)):
                yield {**member, "task": inner}

    def _dump(self, name: str, definition: dict[str, Any]) -> bool:
        is_local = "dataset_kwargs" in definition
        text = yaml.safe_dump(definition) + (
            "custom_dataset: !function src.evaluation.definitions.local_rows\n" * is_local
        )
        (self.folder / f"{len(list(self.folder.iterdir()))}.yaml").write_text(text, encoding="utf-8")
        return True

    def _data(self, name: str, config: dict[str, Any]) -> dict[str, Any] | None:
        """Return the keys that say where a task's data is; None if it is not there."""
        _require_text(name, config)
        if self.num_fewshot and not self.shots(config.get("num_fewshot")):
            self.without_examples.append(name)
        if self.local_data is None:
            self.written.append(name)
            return {}
        if (scored := config.get("test_split") or config.get("validation_split")) is None:
            raise ConfigError(
                f"evaluation.local_data: task {name} reads its data by code of its own; leave the folder out for it"
            )
        shots = self.shots(config.get("num_fewshot"))
        examples = _examples_split(config) if shots else None
        try:
            find_rows(self.local_data, _facts(name, scored))
        except DataError as error:
            also = "" if examples in (None, scored) else f"; its {shots} examples are read from {name}.{examples}.jsonl"
            self.missing[name] = DataError(f"{error}{also}")
            return None
        if examples is not None:
            find_rows(self.local_data, _facts(name, examples), f"takes its {shots} examples from")
        self.written.append(name)
        needed = {scored, examples}
        splits = {split: split if split in needed else scored for key in _SPLITS if (split := config.get(key))}
        splits |= {split: split for split in needed if split is not None}
        local = {"task": name, "folder": str(self.local_data), "splits": splits}
        if examples is not None:
            local |= {"examples": examples, "num_examples": shots + (examples == scored)}
        return {"dataset_kwargs": {"local": local}}


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:8], *([f"{len(names) - 8} more"] if len(names) > 8 else [])])


def _require_text(name: str, config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a task that needs more than a model of text."""
    if config.get("unsafe_code"):
        raise ConfigError(f"evaluation.tasks: {name} runs code that the model writes, which is not supported")
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise ConfigError(f"evaluation.tasks: {name} has images or sounds, and the model reads text alone")


def _examples_split(config: Mapping[str, Any]) -> str | None:
    """Return the split that lm-eval takes examples from; None where the definition holds them."""
    about = config.get("fewshot_config") or {}
    split = about.get("split", config.get("fewshot_split"))
    if split is not None or about.get("samples") is not None:
        return split
    return next(config[key] for key in _SPLITS if config.get(key))


def _facts(name: str, split: str) -> PublishedTask:
    known = TASKS.get(name)
    return replace(known if isinstance(known, PublishedTask) else PublishedTask(name), split=split)


def local_rows(*, local: Mapping[str, Any], **_metadata: object) -> dict[str, Dataset]:
    """Return the rows of a task by split; lm-eval calls this in place of `datasets.load_dataset`.

    Splits that no document is taken from have one row of another, since lm-eval looks at all that a definition names.
    """
    folder, rows = Path(local["folder"]), dict[str, Dataset]()
    for split in sorted(set(local["splits"].values())):
        task = _facts(local["task"], split)
        found, where = read_rows(folder, task), find_rows(folder, task)
        if split == local.get("examples") and len(found) < local["num_examples"]:
            raise DataError(
                f"{where}: {len(found)} rows, but {local['num_examples']} are needed; ask for fewer examples"
            )
        try:
            rows[split] = Dataset.from_list(found)
        except (ValueError, TypeError, OverflowError) as error:
            raise DataError(f"{where}: a key has values of different types, or too large a number ({error})") from error
    return {
        split: rows[source] if source == split else rows[source].select([0])
        for split, source in local["splits"].items()
    }


@contextlib.contextmanager
def _explained(name: str, local_data: Path | None) -> Generator[None]:
    """Turn what a task's definition, its code or the hub raises into one line."""
    problems = _Problems()
    logger = logging.getLogger("lm_eval")
    logger.addHandler(problems)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _reason(error, local_data, problems.metrics)
        raise ConfigError(f"evaluation.tasks: {name} {reason}") from error
    finally:
        logger.removeHandler(problems)


class _Problems(logging.Handler):
    """Collects the metrics that lm-eval has not found, which it only logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.metrics: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        name, found, _ = record.getMessage().partition(" not found in the evaluate library")
        if found:
            self.metrics.append(name)


def _reason(error: Exception, local_data: Path | None, metrics: Sequence[str]) -> str:
    chain = list(causes(error))
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    missing = next((cause for cause in chain if isinstance(cause, ModuleNotFoundError)), None)
    if missing is not None and missing.name is not None:
        package = missing.name.partition(".")[0]
        return f"needs the Python package {package}, which is not installed; pip install {package}"
    if metrics and isinstance(error, TypeError):
        return f"needs the metric {', '.join(metrics)}, which the package evaluate could not fetch; check the network"
    if any(map(_is_of_network, chain)):
        return (
            f"needs something from the Hugging Face hub that cannot be read ({text}); check the network and, for data "
            "that requires it, HF_TOKEN, or name a folder with its data (evaluation.local_data, --local-data)"
        )
    if local_data is None:
        return f"cannot be loaded by lm-eval ({text})"
    return (
        f"cannot be loaded from {local_data} by lm-eval ({text}); its rows must have the keys of its data set on the "
        "Hugging Face hub"
    )


def _is_of_network(error: BaseException) -> bool:
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("httpx", "httpcore", "requests")


class Rehearsal(LM):  # pyright: ignore[reportUntypedBaseClass]
    """Answers at once, so that what a metric needs is missed before a model is scored."""

    def __init__(self) -> None:
        super().__init__()
        self.was_asked = False

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        self.was_asked = True
        return [(-1.0 - number, False) for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        self.was_asked = True
        return [-1.0] * len(requests)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        self.was_asked = True
        return ["The answer is 1."] * len(requests)


def _rehearse(loaded: LoadedTask) -> None:
    """Score two documents of each task without a model, so that what is missing shows."""
    draw_examples(loaded)
    model = Rehearsal()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            evaluate(model, loaded, limit=REHEARSED_DOCUMENTS, bootstrap_iters=0)
    except (ImportError, OSError, TypeError):
        raise
    except Exception as error:
        # A statistic may need more documents, or other answers. NLTK raises LookupError for data that it lacks.
        if not model.was_asked or type(error) is LookupError:
            raise


def draw_examples(loaded: LoadedTask) -> None:
    """Have every scoring draw the same examples, those that lm-eval draws by default."""
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
