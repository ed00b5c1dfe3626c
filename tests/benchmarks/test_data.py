"""The data benchmark runs, and what it measures is bounded."""

import json
from pathlib import Path

import pytest

from src.benchmarks.data import main
from tests.conftest import CONFIGS, STDLIB


@pytest.mark.slow
def test_memory_is_bounded_and_figures_are_written(tmp_path: Path) -> None:
    output = tmp_path / "data.json"
    main(
        [
            "--megabytes=12",
            "--raw-megabytes=2",
            f"--directory={tmp_path}",
            f"--json={output}",
            f"--config={CONFIGS / 'quickstart.yaml'}",
            "--files",
            f"{STDLIB}/email/*.py",
            f"{STDLIB}/asyncio/*.py",
        ]
    )
    figures = json.loads(output.read_text())
    assert figures["text_bytes"] == pytest.approx(12e6, rel=0.02)
    assert 100 < figures["peak_resident_megabytes"] < 1000
    assert figures["ratio"] == pytest.approx(
        figures["megabytes_per_second"] / (sum(figures["raw_megabytes_per_second"]) / 2)
    )
    assert figures["processor_ratio"] > 0.4
    assert 0 < figures["loader_milliseconds"] < 20
    assert figures["machine"]["cores"] >= 1
