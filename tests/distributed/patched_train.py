"""`src.train` with small shards and, on one rank, a fault: a script, so that ranks that Lightning starts run it too.

`FAULT` is `<place>:<rank>`; places are the keys of `FAULTS`.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import callbacks.reparameterize
from callbacks import EvaluationCallback
from src import train
from src.cli import run_verb
from src.lut import build_lut, builder
from src.system.signals import leave_on_stop_signals
from src.training.lightning_module import LanguageModel

SHARD_BYTES = 2**18
MESSAGE = "the injected fault"


def fail(*_: object, **__: object) -> Any:
    raise RuntimeError(MESSAGE)


def fail_in_step() -> None:
    step = LanguageModel.training_step

    def failing_step(self: LanguageModel, *arguments: Any) -> Any:
        return fail() if self.trainer.global_step == 3 else step(self, *arguments)

    LanguageModel.training_step = failing_step  # type: ignore[method-assign]


def fail_in_evaluation() -> None:
    EvaluationCallback.on_train_end = fail


def fail_in_build() -> None:
    builder.write_shards = fail


def wait_in_build() -> None:
    def waiting(*_: object, **__: object) -> None:
        print("waiting", file=sys.stderr, flush=True)
        time.sleep(60)

    builder.write_shards = waiting


FAULTS: dict[str, Callable[[], None]] = {
    "step": fail_in_step,
    "evaluation": fail_in_evaluation,
    "build": fail_in_build,
    "wait": wait_in_build,
}


def main(arguments: list[str] | None = None, fault: str = "") -> None:
    callbacks.reparameterize.build_lut = partial(build_lut, shard_bytes=SHARD_BYTES)
    place, _, rank = fault.partition(":")
    if place and rank == os.environ.get("LOCAL_RANK", "0"):
        FAULTS[place]()
    train.main(arguments)


if __name__ == "__main__":
    leave_on_stop_signals()
    run_verb(partial(main, fault=os.environ.get("FAULT", "")))
