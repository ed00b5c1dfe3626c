"""Which ranks a run has is never guessed: it starts them, takes those of a launcher, or says what does not agree."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

from src.cli import run_verb
from src.errors import ConfigError
from src.system.ranks import is_rank_zero, launcher
from src.train import main, train
from src.training.config import TrainerConfig, require_ranks
from src.training.strategy import cluster_environment
from tests.conftest import CONFIGS, small_config
from tests.distributed.processes import start, wait
from tests.training.test_lightning_module import ONLY_TRAIN

BATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_NNODES": "1",
    "SLURM_NODELIST": "node[1-2]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
"""What a batch script of SLURM sees before it calls `srun`."""
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
LSF = {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "hosts", "JSM_NAMESPACE_LOCAL_RANK": "0", "JSM_NAMESPACE_SIZE": "2"}
OPEN_MPI = {**STEP, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
KUBEFLOW = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "first", "MASTER_PORT": "1"}

ALONE = ("", 1)


@pytest.mark.parametrize(
    ("variables", "expected", "first", "environment"),
    [
        ({}, ALONE, True, "LightningEnvironment"),
        (BATCH, ALONE, True, "LightningEnvironment"),
        ({**BATCH, "SLURM_NTASKS": "2"}, ALONE, True, "LightningEnvironment"),  # salloc, or sbatch --ntasks=2
        ({**BATCH, "SLURM_JOB_NAME": "bash", "SLURM_STEP_ID": "0"}, ALONE, True, "LightningEnvironment"),  # srun --pty
        ({**BATCH, "LOCAL_RANK": "1"}, ALONE, False, "LightningEnvironment"),  # a rank that Lightning started there
        (STEP, ("srun", 2), True, "SLURMEnvironment"),
        ({**STEP, "SLURM_PROCID": "1"}, ("srun", 2), False, "SLURMEnvironment"),
        (TORCHRUN, ("torchrun", 2), False, "TorchElasticEnvironment"),
        ({**STEP, **TORCHRUN, "RANK": "0"}, ("torchrun", 2), True, "TorchElasticEnvironment"),
        (KUBEFLOW, ("torchrun", 2), False, "KubeflowEnvironment"),
        (OPEN_MPI, ("mpirun", 2), True, None),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, ("mpirun", 2), True, None),
        (LSF, ("jsrun", 2), True, None),
        ({**LSF, "JSM_NAMESPACE_SIZE": "1"}, ALONE, True, "LightningEnvironment"),
    ],
)
def test_what_started_a_process_is_read_from_its_environment(
    variables: Mapping[str, str],
    expected: tuple[str, int],
    first: bool,
    environment: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_environment(monkeypatch, variables)
    assert (launcher(), is_rank_zero()) == (expected, first)
    config = TrainerConfig(max_steps=1, devices="2", strategy="ddp", accelerator="cpu")
    if environment is None:
        with pytest.raises(ConfigError, match=f"{expected[0]} started 2 processes, but only torchrun and srun"):
            require_ranks(config)
    else:
        require_ranks(config)
        assert type(cluster_environment(config)).__name__ == environment


def set_environment(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    for name in {*BATCH, *STEP, *LSF, *OPEN_MPI, *TORCHRUN, *KUBEFLOW, "NODE_RANK", "SLURM_NTASKS_PER_NODE"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "message"),
    [
        (TORCHRUN, "4", 1, "trainer.devices: 4 on 1 machines .* are 4 ranks, but torchrun started 2"),
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, "2", 1, "torchrun started 1"),
        (STEP, "1", 1, "are 1 ranks, but srun started 2 on 1"),
        ({**STEP, "SLURM_NNODES": "2"}, "2", 1, "srun started 2 on 2"),
        (KUBEFLOW, "2", 2, "are 4 ranks, but torchrun started 2"),
        (BATCH, "2", 2, "trainer.num_nodes: 2, but this process is the only one"),
        ({}, "1", 2, "trainer.num_nodes: 2, but this process is the only one"),
    ],
)
def test_ranks_that_a_config_does_not_expect_are_one_line(
    variables: Mapping[str, str], devices: str, nodes: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, variables)
    with pytest.raises(ConfigError, match=message):
        require_ranks(TrainerConfig(max_steps=1, devices=devices, num_nodes=nodes, strategy="ddp", accelerator="cpu"))


@pytest.mark.parametrize(
    ("devices", "nodes", "given", "expected"),
    [("8", 1, None, 8), ("8", 4, None, 8), ("8", 4, 32, 32), ("0,2", 3, 3, 3)],
)
def test_a_copy_of_a_sharded_model_is_on_one_machine_or_on_as_many_devices_as_the_key_says(
    devices: str, nodes: int, given: int | None, expected: int
) -> None:
    config = TrainerConfig(max_steps=1, devices=devices, num_nodes=nodes, strategy="fsdp2", shard_devices=given)
    assert config.shard_group_size == expected


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
@pytest.mark.parametrize("given", ["3", "16"])
def test_groups_of_devices_that_are_not_equal_are_one_line(
    given: str, more: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    four = ["trainer.accelerator=cpu", "trainer.devices=4", "trainer.strategy=fsdp2", f"output_dir={tmp_path}"]
    with pytest.raises(SystemExit, match="2"):
        run_verb(partial(main, [*four, f"trainer.shard_devices={given}", *more]))
    error = capsys.readouterr().err
    assert f"error: trainer.shard_devices: {given} does not divide the 4 devices of this run" in error
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_dry_run_accounts_for_the_devices_that_share_a_copy(capsys: pytest.CaptureFixture[str]) -> None:
    four = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.num_nodes=2", "trainer.strategy=fsdp2"]
    main([*four, "--dry-run"])
    assert "FSDP2 over 2" in (printed := capsys.readouterr().out)
    assert "FSDP2 over 8" in printed
    main([*four, "trainer.shard_devices=4", "--dry-run"])
    assert "FSDP2 over 4" in capsys.readouterr().out


TWO = (*ONLY_TRAIN, "trainer.devices=2", "data.micro_batch_size=2", "trainer.max_steps=2", "trainer.strategy=ddp")


@pytest.mark.slow
def test_in_a_batch_script_of_slurm_two_devices_are_two_ranks(
    small_overrides: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, {**BATCH, "SLURM_NTASKS": "2"})  # other jobs look the same to `launcher`
    command = [sys.executable, "-m", "src.train", *small_overrides, *TWO, f"output_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    import torch

    path = tmp_path / "quickstart" / "checkpoints" / "last.ckpt"
    assert len(torch.load(path, weights_only=True)["random_states"]) == 2


@pytest.mark.slow
def test_ranks_that_srun_started_train_together(small_overrides: Sequence[str], tmp_path: Path) -> None:
    config = small_config(small_overrides, tmp_path, *TWO)
    step = {**STEP, "SLURM_NODELIST": "127.0.0.1", "MASTER_ADDR": "127.0.0.1"}
    ranks = [
        start(partial(train, config), tmp_path / f"log-{rank}", **{**step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank})
        for rank in ("0", "1")
    ]
    assert wait(ranks) == [0, 0], (tmp_path / "log-0").read_text()
    assert [path.name for path in tmp_path.glob("quickstart*")] == ["quickstart"]
