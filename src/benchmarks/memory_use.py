"""Peak memory: of one call in this process, and of inference in a process of its own.

The latter counts anonymous memory, which is what a run needs apart from the pages of files.
"""

import ctypes
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src.errors import UserError
from src.inference import generate, load_model

_STEPS, _PROMPT_TOKENS, _SAMPLE_SECONDS = 8, 512, 0.002


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Memory that `work` takes at its peak above what is resident before it; None where it cannot be told."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to what is resident now
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return 1024 * int(line.split()[1])


def anonymous_bytes(run: Path, batch: int, held_out: Tensor) -> int:
    """Return the peak over a prefill of 512 tokens and some steps, at `batch` prompts from `held_out` (N,) ids."""
    ids = run / "prompt-ids.npy"
    repeats = -(-batch * _PROMPT_TOKENS // len(held_out))
    np.save(ids, held_out.repeat(repeats)[: batch * _PROMPT_TOKENS].view(batch, _PROMPT_TOKENS).numpy())
    command = [sys.executable, "-m", "src.benchmarks.memory_use", str(run), str(ids)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the process that measures memory failed: {done.stderr.strip()}")
    return int(done.stdout.split()[0])


class PeakAnonymous:
    """Samples the process's anonymous memory until stopped; the kernel records a peak only of all memory."""

    def __init__(self) -> None:
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.bytes = max(self.bytes, _status_bytes("RssAnon"))

    def stop(self) -> int:
        """Stop and return the peak in bytes."""
        self._stop.set()
        self._thread.join()
        return self.bytes


def main(arguments: Sequence[str]) -> None:
    """Generate from the prompts; print peak anonymous bytes and the seconds that generation took."""
    run, ids = arguments
    token_ids = torch.from_numpy(np.load(ids))
    with load_model(run) as model:
        peak, start = PeakAnonymous(), time.perf_counter()
        generate(model, token_ids, max_new_tokens=_STEPS)
        seconds = time.perf_counter() - start
        print(peak.stop(), seconds)


if __name__ == "__main__":
    main(sys.argv[1:])
