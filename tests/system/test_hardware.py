"""What the machine can do, also when it is another machine than this one."""

from unittest.mock import Mock

import pytest
import torch

from src.system.hardware import native_precision


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
