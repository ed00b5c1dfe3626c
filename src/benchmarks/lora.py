"""`python -m src.benchmarks.lora`: `src.train` with LoRA in place of trained weights, the opponent of plug-ins."""

from collections.abc import Sequence

from callbacks.lora import LoraCallback
from src.benchmarks.common import COUNT
from src.cli import parser, run_verb
from src.system.signals import leave_on_stop_signals
from src.train import main as train


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the rank, and pass the rest on to `src.train`."""
    example = "python -m src.benchmarks.lora --rank 16 -- --config configs/continue.yaml init_from=runs/quickstart"
    options = parser("benchmarks.lora", __doc__ or "", example)
    options.add_argument("--rank", type=COUNT, required=True, help="R, of every matrix of the blocks")
    options.add_argument("arguments", nargs="*", help="after `--`: those of src.train")
    given = options.parse_args(arguments)
    train(given.arguments, callbacks=[LoraCallback(given.rank)])


if __name__ == "__main__":
    leave_on_stop_signals()
    run_verb(main)
