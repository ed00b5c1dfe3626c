"""Runs the cells of a study, each as a process of `src.train`, and keeps `results.csv` complete after each of them.

Whatever ends this process, its cells end too, with a checkpoint, and the next call continues them.
"""

import ctypes
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

import torch

from src.config import RunConfig, load_config, load_run_config
from src.data.packed_corpus import PackedCorpus, prepare_corpus
from src.errors import ConfigError, RunError, UserError
from src.run_directory import RunDirectory
from src.studies.cells import (
    DIGITS,
    Cell,
    Choice,
    best_value,
    cell_overrides,
    config_digest,
    is_finished,
    pretraining_cells,
    reported_cells,
    search_cells,
)
from src.studies.definition import Study
from src.studies.measure import measure, measure_untrained
from src.studies.rows import Row, find, read_rows, write_rows
from src.system.console import progress_report, stderr_console
from src.system.hardware import require_posix, usable_cores
from src.system.locks import open_locked
from src.training.checkpoints import CheckpointFiles
from src.training.resume import starting_rule

POLL_SECONDS = 0.5
STOP_SECONDS = 20.0
"""How long a cell may take to write its checkpoint; `train` needs at most 10."""
_PR_SET_PDEATHSIG = 1

Tell = Callable[[str], None]


@dataclass
class _Running:
    cell: Cell
    config: RunConfig
    process: "Popen[bytes]"
    log: Path
    started: float = field(default_factory=time.monotonic)


@dataclass(kw_only=True)
class Runner:
    """Runs what is missing of a study; `failures` says what did not work, by cell."""

    study: Study
    choice: Choice
    root: Path
    """Folder of run directories."""
    jobs: int = 1
    rerun: bool = False
    tell: Tell
    failures: dict[str, str] = field(default_factory=dict[str, str])
    rows: list[Row] = field(default_factory=list[Row])
    _corpora: dict[str, PackedCorpus] = field(default_factory=dict[str, PackedCorpus])

    @property
    def threads(self) -> int:
        """Threads of each cell."""
        return max(1, usable_cores() // self.jobs)

    def run(self) -> list[Row]:
        """Run the search where it is needed, then the chosen cells; return all rows of the study.

        Raises:
            UserError: a config is wrong, results of another config or corpus are in the way, or the study runs already.
        """
        require_posix("a study")
        self.rows = read_rows(self.study.results_path)
        torch.set_num_threads(self.threads)  # of what is measured here
        cells = reported_cells(self.study, self.choice)
        search = search_cells(self.study, {cell.arm.family for cell in cells})
        with only_here(self.root) as lock:
            new = [cell for cell in (*search, *cells) if self.rerun or find(self.rows, *cell.key) is None]
            self._run_all(pretraining_cells(self.study, self.choice, new), lock)
            self._run_all([cell for cell in search if self._has_base(cell)], lock)
            self._run_all([cell for cell in cells if self._has_base(cell) and self._has_value(cell)], lock)
        return self.rows

    def config(self, cell: Cell) -> RunConfig:
        """Return the resolved config of a cell."""
        return load_config(cell.arm.config, self._overrides(cell))

    def _overrides(self, cell: Cell) -> list[str]:
        return cell_overrides(self.study, cell, self.choice, best_of(self.study, cell, self.rows), self.root)

    def _has_base(self, cell: Cell) -> bool:
        base = None if self.study.pretraining is None else Cell(self.study.pretraining, cell.seed).name
        if base not in self.failures:
            return True
        self.failures[cell.name] = f"{base}, which it starts from, has no result"
        return False

    def _has_value(self, cell: Cell) -> bool:
        if self.study.search is None or not cell.arm.is_trained or best_of(self.study, cell, self.rows) is not None:
            return True
        self.failures[cell.name] = f"the search of {self.study.search.key} has no result for {cell.arm.family}"
        return False

    def _run_all(self, cells: Sequence[Cell], lock: int) -> None:
        waiting = [cell for cell in cells if not self._is_done(cell)]
        done = len(cells) - len(waiting)
        if done:
            self.tell(f"{done} of {len(cells)} cells are finished")
        running: list[_Running] = []
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    running.append(self._start(waiting.pop(0), lock))
                time.sleep(POLL_SECONDS)
                for ended in [item for item in running if item.process.poll() is not None]:
                    running.remove(ended)
                    if waiting:  # it computes while the ended one is measured
                        running.append(self._start(waiting.pop(0), lock))
                    self._finish(ended)
        finally:
            _stop(running)

    def _is_done(self, cell: Cell) -> bool:
        """Whether a cell has a row or a finished run, which then gives it one; clears what cannot be continued."""
        config, run = self.config(cell), RunDirectory(self.root / cell.name)
        row, is_base = find(self.rows, *cell.key), cell.arm is self.study.pretraining
        if row is not None and not self.rerun and self._lacks_base(config):
            return True
        wanted = config_digest(config, cell.arm), self._corpus(config).fingerprint[:DIGITS]
        if row is not None and self.rerun and not is_base:
            self.rows.remove(row)
            write_rows(self.study.results_path, self.rows)
            shutil.rmtree(run.path, ignore_errors=True)
        elif row is not None and not self.rerun:
            _require_same((row.config, row.corpus), wanted, f"{self.study.results_path}: {cell.name}")
            if not is_base or is_finished(run, config):
                return True
        if not cell.arm.is_trained:
            self._add(measure_untrained(cell, config, self._corpus(config)))
            return True
        if not run.config_path.is_file():
            shutil.rmtree(run.path, ignore_errors=True)  # killed before it began
            return False
        found = (
            config_digest(load_run_config(run), cell.arm),
            (run.recorded_corpus("fingerprint") or wanted[1])[:DIGITS],
        )
        if self.rerun and found != wanted:
            shutil.rmtree(run.path)
            return False
        _require_same(found, wanted, str(run.path))
        if is_finished(run, config):
            self._add(measure(run, cell, config, self._corpus(config)))
            return True
        return False

    def _lacks_base(self, config: RunConfig) -> bool:
        """Whether the run that a cell started from is gone, so that nothing can be said about its result."""
        return config.init_from is not None and not RunDirectory(Path(config.init_from)).config_path.is_file()

    def _start(self, cell: Cell, lock: int) -> _Running:
        run, log = RunDirectory(self.root / cell.name), self.root / f"{cell.name}.log"
        is_resumed = CheckpointFiles(run.checkpoints_path).newest() is not None
        self.tell(f"{cell.name}: {'resumed' if is_resumed else 'started'}")
        if is_resumed:
            arguments = ["--resume", str(run.path)]
        else:
            shutil.rmtree(run.path, ignore_errors=True)
            arguments = ["--config", str(cell.arm.config), *self._overrides(cell)]
        rank = cell.arm.lora_rank
        program = ["src.train"] if rank is None else ["src.benchmarks.lora", "--rank", str(rank), "--"]
        with log.open("ab") as output:
            process = Popen(
                [sys.executable, "-m", *program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_environment(self.threads)},
                start_new_session=True,  # so that Ctrl-C reaches this process alone, which ends the cells in order
                preexec_fn=_end_with_parent,
                pass_fds=[lock],
            )
        return _Running(cell, self.config(cell), process, log)

    def _finish(self, ended: _Running) -> None:
        run, name = RunDirectory(self.root / ended.cell.name), ended.cell.name
        if ended.process.returncode == 0 and is_finished(run, ended.config):
            row = measure(run, ended.cell, ended.config, self._corpus(ended.config))
            self._add(row)
            minutes = (time.monotonic() - ended.started) / 60
            self.tell(f"{name}: {row.held_out_loss:.4f} nats per token ({minutes:.1f} min)")
            return
        self.failures[name] = f"exit code {ended.process.returncode}: {_last_line(ended.log)} ({ended.log})"
        self.tell(f"{name} failed with {self.failures[name]}")

    def _add(self, row: Row) -> None:
        order = {name: index for index, name in enumerate(self.study.arms)}
        self.rows = [*(other for other in self.rows if other.key != row.key), row]
        self.rows.sort(key=lambda item: (bool(item.value), order.get(item.arm, len(order)), item.arm, _order(item)))
        write_rows(self.study.results_path, self.rows)

    def _corpus(self, config: RunConfig) -> PackedCorpus:
        key = repr(config.data)
        if key not in self._corpora:
            with progress_report(stderr_console()) as progress:
                rule = starting_rule(config.init_from, config.data.tokenizer)
                vocab_size = config.model.vocab_size
                self._corpora[key] = prepare_corpus(config.data, rule, vocab_size=vocab_size, report=progress)
        return self._corpora[key]


def _order(row: Row) -> tuple[float, int]:
    try:
        return float(row.value or 0), row.seed
    except ValueError:
        return math.inf, row.seed


def best_of(study: Study, cell: Cell, rows: Sequence[Row]) -> str | None:
    """Return the searched value that a reported cell uses; None without a search, or before it has a result."""
    search = study.search
    if search is None or cell.value or cell.arm.family is None:
        return None
    own = search.study == study.path.resolve()
    return best_value(search, cell.arm.family, rows if own else read_rows(search.study.parent / "results.csv"))


def _require_same(found: tuple[str, str], wanted: tuple[str, str], where: str) -> None:
    for kind, there, here in zip(("config", "corpus"), found, wanted, strict=True):
        if there != here:
            raise RunError(
                f"{where}: is a result of {kind} {there}, but the study now has {here}; "
                "run these cells again with --rerun, or copy the study's folder to another name"
            )


def _environment(threads: int) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}


def _end_with_parent() -> None:
    """Let Linux end this child with SIGTERM when its parent is killed; elsewhere the lock tells that it still runs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(running: Sequence[_Running]) -> None:
    """End cells with a checkpoint, and those that do not end in time without."""
    for item in running:
        with suppress(ProcessLookupError):
            item.process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for item in running:
        try:
            item.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            item.process.kill()
            item.process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


@contextmanager
def only_here(root: Path) -> Generator[int]:
    """Hold the lock of a study's runs, which its cells inherit; yield the lock's file descriptor.

    UserError when another process holds it for longer than killed cells need to end.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: {root} cannot be created ({error.strerror}); name another folder") from error
    deadline = time.monotonic() + STOP_SECONDS
    while True:
        try:
            descriptor = open_locked(root / ".lock")
            break
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise UserError(f"{root}: this study runs already; wait for it, or end its process") from error
            time.sleep(POLL_SECONDS)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
