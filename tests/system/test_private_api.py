"""What to check when an upper bound on torch, Lightning or W&B in pyproject.toml is raised.

Each test here exercises one function of `src/system/private_api.py` on the real object. When one fails with a new
version, look there for what the name is for and what to do without it. Whole runs check the effects:
`tests/training/test_resume.py`, `tests/training/test_tracking.py` and `tests/distributed`.
"""

import ast
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from packaging.requirements import Requirement
from torch import Tensor
from torch.utils.data import DataLoader

from src.model import products
from src.system import private_api
from src.training.strategy import ShardedStrategy
from src.training.tracking import MetricsFile

ROOT = Path(__file__).parents[2]
SOURCES = [*ROOT.glob("src/**/*.py"), *ROOT.glob("callbacks/**/*.py")]
FOREIGN = ("torch", "lightning", "wandb", "torchmetrics")
STANDARD = ("_exit", "_replace")  # of Python: os and named tuples


@pytest.mark.parametrize("name", ["torch", "lightning", "wandb"])
def test_the_next_minor_version_is_not_installed_by_itself(name: str) -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (allowed,) = [Requirement(line) for line in listed if Requirement(line).name == name]
    major, minor, *_ = version(name).split(".")
    assert version(name) in allowed.specifier
    assert f"{major}.{int(minor) + 1}.0" not in allowed.specifier


class _Model(BoringModel):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # type: ignore[override]
        self.log("loss", 1.0)
        return self.layer(batch).sum()


class _LogsEarly(lightning.Callback):
    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        file = Path(trainer.default_root_dir) / "metrics.csv"
        assert not file.exists()
        private_api.log_step_now(trainer)
        trainer.loggers[0].save()
        assert file.read_text().split() == ["epoch,loss,step", "0,1.0,0"]


def test_compiled_layers_are_not_split_for_ddp() -> None:
    from torch._dynamo import config

    config.optimize_ddp = True  # also where something has taken the name away, as unittest.mock.patch does
    private_api.keep_graphs_whole()
    assert config.optimize_ddp is False


def test_a_step_is_logged_before_the_callbacks_that_follow(tmp_path: Path) -> None:
    trainer = lightning.Trainer(
        max_steps=1,
        logger=MetricsFile(tmp_path, 0),
        log_every_n_steps=1,
        callbacks=[_LogsEarly()],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(_Model(), DataLoader(RandomDataset(32, 1)))
    assert trainer.global_step == 1


def test_the_logged_step_follows_the_optimizer() -> None:
    trainer = lightning.Trainer(logger=False, barebones=True)
    progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
    progress.optimizer.step.total.completed = 7
    private_api.set_logged_step(trainer)
    assert trainer.global_step == trainer.fit_loop.epoch_loop._batches_that_stepped == 7


def test_ranks_that_are_scripts_are_told_from_forks() -> None:
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, barebones=True)
    assert isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher)
    assert private_api.ranks_are_scripts(trainer)
    assert private_api.started_ranks(trainer) == trainer.strategy.launcher.procs == []
    forked = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, barebones=True)
    assert isinstance(forked.strategy.launcher, _MultiProcessingLauncher)
    assert not private_api.ranks_are_scripts(forked)
    assert private_api.started_ranks(forked) == []


def test_all_devices_form_one_group() -> None:
    strategy = ShardedStrategy(shard_devices=2, sharded_checkpoints=False)
    strategy.parallel_devices, strategy.num_nodes = [torch.device("cpu")] * 3, 2
    private_api.use_all_devices(strategy)
    assert "self._data_parallel_size" in inspect.getsource(ModelParallelStrategy.setup_environment)
    assert strategy._data_parallel_size == 6


def test_wandb_is_asked_for_nothing_it_warns_of(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    private_api.drop_anonymous(logger)
    private_api.drop_anonymous(logger)  # also when Lightning no longer passes it
    assert "anonymous" not in logger._wandb_init
    assert not private_api.has_started(logger)
    logger._experiment = object()
    assert private_api.has_started(logger)


def test_a_name_that_is_gone_is_told_with_the_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"DDPStrategy: no attribute _data_parallel_size .* that pyproject.toml"):
        private_api.use_all_devices(DDPStrategy(parallel_devices=[], cluster_environment=LightningEnvironment()))


def test_slow_products_are_those_that_torch_would_not_hand_to_onednn() -> None:
    fast = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    assert {dtype for dtype, is_fast in fast.items() if not is_fast} == products.SLOW_ON_CPU


def test_no_other_module_names_a_private_attribute() -> None:
    found = {path: list(_private_names(path.read_text())) for path in SOURCES if path.name != "private_api.py"}
    assert {path: names for path, names in found.items() if names} == {}


def _private_names(source: str) -> Iterator[str]:
    """Private names imported from foreign libraries, and private attributes that the module itself does not define."""
    own = set(re.findall(r"\b(?:self|cls)\.(_\w+)", source))
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] in FOREIGN:
                found = [*module.split("."), *(alias.name for alias in names)]
                yield from (f"line {node.lineno}: {name}" for name in found if _is_private(name))
            case ast.Import(names=names):
                found = [part for alias in names for part in alias.name.split(".")]
                yield from (f"line {node.lineno}: {name}" for name in found if _is_private(name))
            case ast.Attribute(attr=name) if _is_private(name) and name not in own and name not in STANDARD:
                yield f"line {node.lineno}: {ast.unparse(node)}"
            case _:
                pass


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_subclass_uses_a_private_name_of_its_library() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES]
    found = {kind: _private_names_of_bases(kind) for name in names for kind in _subclasses(_imported(name))}
    assert len(found) > 20
    assert {kind: names for kind, names in found.items() if names} == {}


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":  # of the extra `eval`
            raise
        return ModuleType(name)


def _private_names_of_bases(kind: type) -> set[str]:
    """The private names in a class that the foreign classes it extends mention too."""
    bases = [base for base in kind.__mro__ if base.__module__.split(".")[0] in FOREIGN]
    theirs = {name for base in bases for name in re.findall(r"\b_[a-z]\w*", _source(base))}
    return set(re.findall(r"\b(?:self\.|def )(_[a-z]\w*)", _source(kind))) & theirs


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except OSError:  # a class that was made at run time
        return ""


def _subclasses(module: ModuleType) -> Iterator[type]:
    """The classes of a module that extend one of a foreign library."""
    for kind in vars(module).values():
        ours = inspect.isclass(kind) and kind.__module__ == module.__name__
        if ours and any(base.__module__.split(".")[0] in FOREIGN for base in kind.__mro__):
            yield kind
