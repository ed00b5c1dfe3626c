"""`python -m src.benchmarks.imported`: a decode step of an imported model here, against transformers.

The run that `convert --from hf` made and the folder that it was made from read the same prompts of real text, then take
the same next tokens of it in turn, each with its own cache of keys and values. A step ends with the next ids on the
CPU. Both hold the weights in the type in which the folder has them.

B batch, T tokens.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from src.benchmarks.common import (
    COUNT,
    Target,
    Timings,
    add_text_options,
    describe_machine,
    machine_line,
    report,
    run_rounds,
)
from src.benchmarks.decode import print_timings
from src.benchmarks.workload import PROMPT_TOKENS, decode_step, load_text_ids
from src.cli import find_run, parser, run_verb
from src.errors import UserError
from src.inference import InferenceModel, load_model
from src.inference.generation import PREFILL_CHUNK_TOKENS, prefill
from src.model import KeyValueCache
from src.system.console import progress_bar

HERE, THERE = "this project", "transformers"


def find_tokenizer(folder: Path) -> Path:
    """Return the tokenizer of a folder that transformers opens."""
    if not (path := folder / "tokenizer.json").is_file():
        raise UserError(f"--folder: {path} is missing; give a folder that transformers opens")
    return path


def load_folder(folder: Path) -> Any:
    """Return a folder's model as transformers loads it by default, in the type of its weights."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError('this compares with transformers, which is not installed; pip install -e ".[dev]"') from None
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def steps_here(model: InferenceModel, prompts: Tensor, following: Tensor) -> Callable[[int], float]:
    """Read `prompts` (B, T), and return a call that feeds column `number` of `following` (B, steps)."""
    room = prompts.shape[1] + following.shape[1]
    cache = KeyValueCache(model.config, len(prompts), room, device=prompts.device, dtype=model.embedding.weight.dtype)
    prefill(model, prompts, cache, None, PREFILL_CHUNK_TOKENS)
    return lambda number: decode_step(model, following[:, number], cache)


def steps_there(model: Any, prompts: Tensor, following: Tensor) -> Callable[[int], float]:
    """Do the same with a model of transformers and the cache that it makes."""
    cache = model(prompts, use_cache=True, logits_to_keep=1).past_key_values

    def step(number: int) -> float:
        start = time.perf_counter()
        logits = model(following[:, number : number + 1], past_key_values=cache, logits_to_keep=1).logits
        logits[:, -1].max(dim=-1).indices.cpu()
        return time.perf_counter() - start

    return step


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print, and write JSON and a plot."""
    example = "python -m src.benchmarks.imported --folder SmolLM2-135M --run runs/smollm2"
    options = parser("benchmarks.imported", __doc__ or "", example)
    options.add_argument("--folder", type=Path, required=True, help="what transformers opens")
    options.add_argument("--run", type=Path, required=True, help="what it became by convert --from hf")
    options.add_argument("--batches", type=COUNT, nargs="+", default=[1, 8], help="default: 1 8")
    options.add_argument("--rounds", type=COUNT, default=33, help="steps, in turn (default: 33)")
    add_text_options(options)
    given, console, steps = options.parse_args(arguments), Console(), dict[str, Timings]()
    run, tokenizer = find_run(given.run), find_tokenizer(given.folder)
    text = load_text_ids(given.corpus, given.tokenizer or tokenizer, run.model_config().vocab_size)
    with load_model(run) as here:
        there = load_folder(given.folder)
        for batch in given.batches:
            streams = text.streams(batch, PROMPT_TOKENS + given.rounds + 2)
            parts = streams[:, :PROMPT_TOKENS], streams[:, PROMPT_TOKENS:]
            calls = {HERE: steps_here(here, *parts), THERE: steps_there(there, *parts)}
            for call in calls.values():  # fill buffers, choose kernels
                for number in (given.rounds, given.rounds + 1):
                    call(number)
            with progress_bar(f"batch {batch}", given.rounds) as advance:
                steps[f"batch {batch}"] = run_rounds(calls, given.rounds, advance)
        dtype = str(here.embedding.weight.dtype).removeprefix("torch.")
    checks: list[Target] = [timings.target(f"{title}: ", HERE, THERE, 1.0) for title, timings in steps.items()]
    machine = describe_machine()
    console.print(f"{machine_line(machine)}\n{given.folder.name} in {dtype}, after {PROMPT_TOKENS} tokens of text")
    for title, timings in steps.items():
        print_timings(f"a decode step, {title}", timings, console, THERE)
    report(given.output, {"machine": machine, "dtype": dtype}, steps, checks, "milliseconds", 1e3, console)


if __name__ == "__main__":
    run_verb(main)
