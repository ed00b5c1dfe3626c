"""What an exported table costs in memory: next to nothing, however large it is on disk."""

import subprocess
import sys
from pathlib import Path

import pytest

from src.benchmarks.workload import write_runs
from src.interop import export_huggingface
from src.lut import read_manifest
from src.model import ModelConfig

pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory"),
]

LARGE = ModelConfig(
    vocab_size=32_000,
    hidden_size=512,
    num_layers=4,
    num_heads=8,
    intermediate_size=1024,
    num_experts=4,
    expert_intermediate_size=512,
    max_sequence_length=1024,
)
PROGRAM = """
import pathlib, sys, threading, torch
sys.modules["src"] = None
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="auto")
peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        (line,) = [line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line]
        peak = max(peak, int(line.split()[1]))

watcher = threading.Thread(target=watch)
watcher.start()
prompt = torch.randint(32_000, (1, 512), generator=torch.Generator().manual_seed(0))
model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)
done.set(), watcher.join()
print(peak)
"""


def anonymous_kib(folder: Path) -> int:
    """Return the peak of anonymous memory over a prompt of 512 tokens and 16 more."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_table_of_500_megabytes_takes_less_than_64_to_generate(tmp_path: Path) -> None:
    mole, dense = write_runs(tmp_path, LARGE, "bfloat16", None, with_experts=False)
    layout = read_manifest(mole / "lut").layout
    assert layout.row_bytes * LARGE.vocab_size > 500e6
    for run in (mole, dense):
        export_huggingface(run, tmp_path / f"{run.name}-folder")
    assert anonymous_kib(tmp_path / "mole-folder") - anonymous_kib(tmp_path / "dense-folder") <= 64_000
