"""Shared fixtures: a small real corpus and a small model trained on it, once per test session."""

import os
import sysconfig
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from src.config import RunConfig, load_config
from src.run_directory import RunDirectory
from src.train import RunResult, train

torch.set_num_threads(1)  # small matrices: threads cost more than they bring, and far more beside a busy neighbour

CONFIGS = Path(__file__).parent.parent / "configs"
STDLIB = Path(sysconfig.get_path("stdlib"))

SMALL = (
    "model.vocab_size=512",
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.intermediate_size=128",
    "model.expert_intermediate_size=128",
    "model.max_sequence_length=128",
    "data.sequence_length=64",
    "data.global_batch_size=8",
    "data.micro_batch_size=4",
    "data.validation_fraction=0.1",
    "data.validation_windows=64",
    "optimizer.warmup_steps=5",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=5",
    "trainer.val_check_interval=30",
    "evaluation.sample_tokens=16",
    "wandb.mode=disabled",
)
"""Overrides that shrink the quick start to seconds."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--attacks", type=int, default=1, metavar="N", help="random moments of each test that has some")


@pytest.fixture(scope="session")
def attacks(request: pytest.FixtureRequest) -> int:
    """At how many random moments a test kills, interrupts or breaks what it runs: few here, many before a release."""
    return int(request.config.getoption("--attacks") or 0)


@contextmanager
def open_files_limited(spare: int) -> Generator[None]:
    """Let this process open `spare` more files, no more."""
    resource = pytest.importorskip("resource", reason="limits of open files can be set on Unix only")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The next ones that would be opened: not always one after another, since earlier tests may hold some between.
    free = [os.dup(1) for _ in range(spare + 1)]
    for descriptor in free:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[spare], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of tokenized corpora for the whole session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def small_overrides(cache_dir: Path) -> Sequence[str]:
    """The quick start, shrunk, on two packages of the standard library."""
    files = f"data.files=[{STDLIB}/json/*.py,{STDLIB}/email/*.py,{STDLIB}/http/*.py]"
    return (*SMALL, files, f"data.cache_dir={cache_dir}")


def small_config(overrides: Sequence[str], output_dir: Path, *more: str) -> RunConfig:
    """Load the shrunk quick start, with its runs under `output_dir`."""
    return load_config(CONFIGS / "quickstart.yaml", [*overrides, f"output_dir={output_dir}", *more])


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, small_overrides: Sequence[str]) -> RunResult:
    """A small MoLE trained in float32 for long enough that its table matters; treat its directory as read-only."""
    config = small_config(
        small_overrides, tmp_path_factory.mktemp("runs"), "trainer.precision=32-true", "trainer.max_steps=120"
    )
    return train(config)


PLUG_IN = (
    *("model.num_experts=2", "model.expert_layers=auto", "model.null_expert=true", "model.expert_intermediate_size=64"),
    *("optimizer.backbone_multipliers.learning_rate=0", "optimizer.learning_rate=1e-2", "trainer.max_steps=12"),
    *("trainer.val_check_interval=6", "trainer.max_time=null", "optimizer.schedule=constant"),
)
"""Overrides of the shrunk quick start that train experts added to a run, and nothing else."""


@pytest.fixture(scope="session")
def dense_run(small_overrides: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A small Dense, trained for a moment; treat its directory as read-only."""
    more = (
        "model.num_experts=0",
        "trainer.max_steps=20",
        "name=base",
        "evaluation.at_fit_end=false",
        "evaluation.dashboard=false",
    )
    return RunDirectory(train(small_config(small_overrides, tmp_path_factory.mktemp("base"), *more)).run_dir)


@pytest.fixture(scope="session")
def plug_in_run(
    dense_run: RunDirectory, small_overrides: Sequence[str], tmp_path_factory: pytest.TempPathFactory
) -> RunResult:
    """A plug-in for `dense_run`; treat its directory as read-only."""
    more = (f"init_from={dense_run.path}", *PLUG_IN, "name=plug-in", "lut.dtype=float32")
    return train(small_config(small_overrides, tmp_path_factory.mktemp("plug-in"), *more))
