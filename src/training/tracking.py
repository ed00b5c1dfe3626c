"""Where metrics, figures, tables and files of a run go: `metrics.csv`, always, and Weights & Biases.

A resumed run continues both: the CSV from its checkpoint's step on, the W&B run under its recorded id. W&B also gets
config, figures, tables and files, but no path outside the run directory.
"""

import csv
import importlib.metadata
import io
import netrc
import os
import re
import secrets
import subprocess
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import lightning
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, WandbLogger

from src.errors import ConfigError, WriteError
from src.run_directory import RunDirectory, map_paths
from src.system.files import write_text, writing
from src.system.private_api import drop_anonymous, has_started
from src.system.ranks import is_rank_zero
from src.training.config import WandbConfig

NOT_LOGGED = "(a path: not logged)"
_DATA_DIR = "WANDB_DATA_DIR"


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with its paths replaced by a note; fingerprints identify their contents."""
    return map_paths(config, lambda _: NOT_LOGGED)


def logged_step(trainer: lightning.Trainer) -> int:
    """Return the step that Lightning logs a validation under now: the index of the last step, not their number.

    Resuming drops rows from the first repeated step on, so everything about one validation needs the same step.
    """
    return max(0, trainer.global_step - 1)


def log_figures(loggers: Iterable[Logger], figures: Mapping[str, Path], step: int) -> None:
    """Send PNG files to W&B; call it on rank 0."""
    for logger in _wandb(loggers):
        for name, path in figures.items():
            logger.log_image(f"figures/{name}", [str(path)], step=step)


def log_table(
    loggers: Iterable[Logger], name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
) -> None:
    """Send a table to W&B; call it on rank 0."""
    for logger in _wandb(loggers):
        with _staged_in_run(logger):
            logger.log_table(f"tables/{name}", columns=list(columns), data=[list(row) for row in rows], step=step)


def publish_results(loggers: Iterable[Logger], run: RunDirectory, *, with_table: bool) -> None:
    """Send the report and, `with_table`, the lookup table as artifacts, without a local copy; call it on rank 0."""
    for logger in _wandb(loggers):
        with _staged_in_run(logger):
            _publish(logger, [run.report_path], artifact_name("report", run.path.name), "report")
            if with_table and run.lut_path().is_dir():
                _publish(logger, sorted(run.lut_path().iterdir()), artifact_name("lut", run.path.name), "lut")


def artifact_name(kind: str, run: str) -> str:
    """Return a name that W&B accepts: at most 128 ASCII letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", f"{kind}-{run}")[:128]


def _publish(logger: WandbLogger, files: Sequence[Path], name: str, kind: str) -> None:
    import wandb

    artifact = wandb.Artifact(name, type=kind)
    for file in files:
        artifact.add_file(str(file), policy="immutable", skip_cache=True)
    logger.experiment.log_artifact(artifact)


@contextmanager
def _staged_in_run(logger: WandbLogger) -> Generator[None]:
    """Make W&B stage files inside the run: a path in the user's home would end up in its record."""
    before = os.environ.get(_DATA_DIR)
    os.environ[_DATA_DIR] = str(Path(logger.save_dir or ".") / "wandb")
    try:
        yield
    finally:
        if before is None:
            del os.environ[_DATA_DIR]
        else:
            os.environ[_DATA_DIR] = before


def _wandb(loggers: Iterable[Logger]) -> list[WandbLogger]:
    return [logger for logger in loggers if isinstance(logger, WandbLogger)]


_WANDB_ID = "wandb_id"
_WRITE_EVERY = 100
"""Steps whose metrics wait in memory at most; a checkpoint writes them too."""


def build_loggers(
    config: WandbConfig, resolved: Mapping[str, Any], run: RunDirectory, first_step: int = 0
) -> list[Logger]:
    """Return the loggers of a run that starts or resumes at `first_step`; only `online` mode sends data.

    W&B records `resolved`, the run's whole config, without its paths.
    """
    loggers: list[Logger] = [MetricsFile(run.path, first_step)]
    mode = wandb_mode(config)
    if mode != "disabled":
        loggers.append(_wandb_logger(config, resolved, run, mode))
    return loggers


def wandb_mode(config: WandbConfig) -> str:
    """Resolve `auto`: as WANDB_MODE or WANDB_DISABLED says, else online with an API key and offline without one.

    ConfigError where WANDB_MODE has a value that W&B does not know.
    """
    if config.mode != "auto":
        return config.mode
    wanted = os.environ.get("WANDB_MODE", "").lower()
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        wanted = "disabled"
    known = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
    if wanted and wanted not in known:
        raise ConfigError(f"WANDB_MODE: {wanted!r}, but it must be one of online, offline, disabled")
    return known[wanted] if wanted else ("online" if _has_api_key() else "offline")


def _has_api_key() -> bool:
    """Look where W&B looks, without importing it (which takes seconds) or logging in."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_logger(config: WandbConfig, resolved: Mapping[str, Any], run: RunDirectory, mode: str) -> WandbLogger:
    import wandb

    logger = WandbLogger(
        id=_wandb_id(run),
        resume="allow",
        name=run.path.name,
        save_dir=run.path,
        project=config.project or os.environ.get("WANDB_PROJECT") or "mole",
        entity=config.entity,
        tags=list(config.tags),
        offline=mode == "offline",
        config={**without_paths(resolved), "code": code_version(), "fingerprints": _fingerprints(run)},
        # no console output, no host name, no command line, no paths: metrics and config are all that is recorded
        settings=wandb.Settings(
            console="off", silent=True, host="not recorded", x_disable_meta=True, x_disable_stats=True
        ),
    )
    drop_anonymous(logger)
    return logger


def _fingerprints(run: RunDirectory) -> dict[str, str | None]:
    """Return the fingerprints of a run's corpus and tokenizer."""
    return {"dataset": run.recorded_corpus("fingerprint"), "tokenizer": run.recorded_corpus("tokenizer")}


def _wandb_id(run: RunDirectory) -> str:
    """Return the id that this run has at W&B, a new one when it has none yet."""
    recorded = run.record()
    if _WANDB_ID in recorded:
        return recorded[_WANDB_ID]
    new = secrets.token_hex(4)
    if is_rank_zero():
        run.update_record({_WANDB_ID: new})
    return new


class MetricsFile(Logger):
    """`metrics.csv` in a directory, one row per logged step. Rows before `first_step` are kept, later ones replaced.

    Lightning's `CSVLogger` deletes an existing file.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        super().__init__()
        self._path, self._first_step = directory / "metrics.csv", first_step
        self._columns: list[str] | None = None
        self._unwritten: list[dict[str, Any]] = []

    @property
    def name(self) -> None: ...

    @property
    def version(self) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...  # `config.yaml` holds them

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        self._unwritten.append({**metrics, "step": step})
        if (step + 1) % _WRITE_EVERY == 0:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        rows = self._unwritten
        names = {name for row in rows for name in row}
        text = io.StringIO(newline="")
        if self._columns is not None and names.issubset(self._columns) and self._path.is_file():
            csv.DictWriter(text, self._columns).writerows(rows)
            self._append(text.getvalue())
        elif rows:
            columns, earlier = self._written()
            self._columns = sorted(names.union(columns))
            writer = csv.DictWriter(text, self._columns)
            writer.writeheader()
            writer.writerows([*earlier, *rows])
            write_text(self._path, text.getvalue())
        self._unwritten = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        with suppress(WriteError) if status == "failed" else nullcontext():  # which must not hide why
            self.save()

    def _append(self, text: str) -> None:
        """Append whole rows, or none."""
        with writing(self._path):
            size = self._path.stat().st_size
            try:
                with self._path.open("a", newline="", encoding="utf-8") as handle:
                    handle.write(text)
            except OSError:
                os.truncate(self._path, size)
                raise

    def _written(self) -> tuple[Sequence[str], list[dict[str, Any]]]:
        """Return columns and rows of the file, without rows that will be replaced or were cut short by a kill."""
        if not self._path.is_file():
            return [], []
        with self._path.open(newline="", encoding="utf-8") as handle:
            reader = csv.DictReader(handle)
            rows = [row for row in reader if (row["step"] or "").isdecimal()]
        if self._columns is None:
            rows = [row for row in rows if int(row["step"]) < self._first_step]
        return reader.fieldnames or [], rows


def package_version(name: str) -> str | None:
    """Return the version of an installed package; None where it is used without an installation."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def code_version() -> dict[str, str | bool | None]:
    """Return the package's version, its commit, and whether files differ from it; outside a checkout these are None."""
    commit = _git("rev-parse", "HEAD")
    return {
        "version": package_version("mole"),
        "commit": commit,
        "modified": None if commit is None else bool(_git(*_CHANGED)),
    }


_CHANGED = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)configs/studies")
"""Results of studies are no code, and each changes them; a run records the config that it was made with."""


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # an installed package may be inside another repository
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def close_loggers(loggers: Iterable[Logger], *, failed: bool) -> None:
    """Finish the W&B run, so that its record is complete when `train` returns."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and has_started(logger):
            logger.experiment.finish(exit_code=int(failed))
