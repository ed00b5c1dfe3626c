"""Peak memory: of one call in this process, and of inference in a process of its own.

The latter counts anonymous memory, which is what a run needs apart from the pages of files.
"""

import ctypes
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
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
    before = status_bytes("VmRSS")
    work()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    """Return a field of this process's status that is in kB, such as VmHWM, in bytes; Linux only."""
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


@contextmanager
def sampled_peak(read: Callable[[], int], interval_seconds: float) -> Generator[list[int]]:
    """Yield a list whose only entry is the largest value of `read` so far; a thread calls it again and again."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(interval_seconds):
            peak[0] = max(peak[0], read())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def main(arguments: Sequence[str]) -> None:
    """Generate from the prompts; print peak anonymous bytes and the seconds that generation took."""
    run, ids = arguments
    token_ids = torch.from_numpy(np.load(ids))
    with load_model(run) as model:
        start = time.perf_counter()
        with sampled_peak(lambda: status_bytes("RssAnon"), _SAMPLE_SECONDS) as peak:  # the kernel records no such peak
            generate(model, token_ids, max_new_tokens=_STEPS)
        print(peak[0], time.perf_counter() - start)


if __name__ == "__main__":
    main(sys.argv[1:])
