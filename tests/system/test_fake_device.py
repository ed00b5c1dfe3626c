"""What runs on a GPU, checked without one: see `fake_device`, whose process these tests read."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import CONFIGS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("fake device")]  # one process makes what all of them read


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.system.fake_device"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_everything_stays_on_the_device(found: dict[str, Any]) -> None:
    assert found["cases"] >= 60
    assert found["caught"] == "FakeTensorDeviceMismatchError"  # of a mask made on the CPU


def test_nothing_needs_an_operation_that_deterministic_algorithms_lack(found: dict[str, Any]) -> None:
    assert found["refused"] == []


def test_a_decoded_token_waits_for_the_device_once(found: dict[str, Any]) -> None:
    for case, waits in found["decode_waits"].items():
        assert max(waits) <= 1, case


def test_a_training_step_waits_twice_and_a_micro_batch_not_at_all(found: dict[str, Any]) -> None:
    assert len(found["training_waits"]) == 12
    for case, waits in found["training_waits"].items():
        assert waits == [2, 3, 2, 3], case  # the third writes logs


def test_a_layer_of_a_table_costs_a_decode_step_few_kernels(found: dict[str, Any]) -> None:
    for batch in ("1", "8"):
        two, four = found["decode_kernels"][batch]
        per_layer = (four - two) / 2
        assert per_layer <= 7
        assert two - 2 * per_layer <= 6
