"""What the machine can do, also when it is another machine than this one."""

from unittest.mock import Mock

import lightning
import pytest
import torch

from src.data.config import DataConfig
from src.data.datamodule import PackedDataModule
from src.errors import ConfigError
from src.system.hardware import native_precision
from src.train import main
from src.training.config import TrainerConfig


@pytest.mark.parametrize("has_instructions", [True, False])
def test_the_precision_is_that_of_the_accelerator_that_is_used(
    monkeypatch: pytest.MonkeyPatch, has_instructions: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", Mock(return_value=not has_instructions))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_instructions})
    on_cpu, on_gpu = ("bf16-mixed", "32-true") if has_instructions else ("32-true", "bf16-mixed")
    assert native_precision("cpu") == on_cpu
    assert native_precision("auto") == native_precision("gpu") == native_precision("cuda") == on_gpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native_precision("auto") == on_cpu


@pytest.mark.parametrize(("accelerator", "kept"), [("cpu", 1), ("auto", 0), ("cuda", 0)])
def test_only_training_on_the_cpu_keeps_freed_memory(
    accelerator: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    keep = Mock()
    monkeypatch.setattr("src.train.keep_freed_memory", keep)
    monkeypatch.setattr("src.train._train_as_process", Mock())
    main([f"trainer.accelerator={accelerator}"])
    assert keep.call_count == kept


def test_a_gpu_is_not_asked_for_its_precision_before_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", Mock(side_effect=AssertionError("started CUDA")))
    forked = TrainerConfig(max_steps=1, strategy="ddp_fork")
    with pytest.raises(ConfigError, match=r"set trainer\.precision=bf16-mixed, or trainer\.strategy=ddp"):
        _ = forked.resolved_precision
    assert TrainerConfig(max_steps=1, strategy="ddp_fork", accelerator="cpu").resolved_precision


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_validation_batches_are_page_locked_for_a_gpu_alone(
    device: str, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module = PackedDataModule(Mock(), DataConfig(), torch.zeros(3, 9, dtype=torch.int64))
    strategy = Mock(root_device=torch.device(device))
    module.trainer = Mock(spec=lightning.Trainer, global_rank=0, world_size=1, strategy=strategy)
    assert module.val_dataloader().pin_memory == pinned
