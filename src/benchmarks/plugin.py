"""`python -m src.benchmarks.plugin`: what a plug-in costs beside the model that it is for.

A training step of `configs/plugin/plugin.yaml` against one of `configs/continue.yaml`, which trains everything, on the
same windows of real text in the same micro-batches; each contender is a process of its own, so that each has its own
peak of resident memory. And with `--attach`, a decode step with the table on a cold disk against the base alone.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from src.benchmarks import workload
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
from src.benchmarks.imported import steps_here
from src.benchmarks.memory_use import status_bytes
from src.benchmarks.workload import PROMPT_TOKENS, TextIds, load_text_ids
from src.cli import find_run, parser, run_verb
from src.config import RunConfig, load_config
from src.data.tokenizer import load_tokenizer
from src.inference import load_model
from src.model import Transformer
from src.model.loss import next_token_loss
from src.run_directory import RunDirectory
from src.system.console import progress_bar
from src.system.hardware import keep_freed_memory
from src.training.optimization import build_optimizer, clip_gradients, freeze
from src.training.resume import start_from_run

CONFIGS = Path(__file__).parents[2] / "configs"
PLUG_IN, FULL = "plug-in, frozen base", "full fine-tuning"
BASE, COLD, WARM = "base alone", "plug-in, cold disk", "plug-in, warm disk"
TIME, MEMORY = 0.80, 0.70
"""What training a plug-in may take of full fine-tuning's time and memory."""


def training_configs(base: Path, overrides: Sequence[str]) -> dict[str, RunConfig]:
    """Return the ready configs of both contenders, for a run to start from."""
    paths = {PLUG_IN: CONFIGS / "plugin" / "plugin.yaml", FULL: CONFIGS / "continue.yaml"}
    return {name: load_config(path, [f"init_from={base}", *overrides]) for name, path in paths.items()}


class Training:
    """Optimizer steps of a config, as `src.train` takes them."""

    def __init__(self, config: RunConfig) -> None:
        keep_freed_memory()
        run = RunDirectory(Path(str(config.init_from)))
        torch.manual_seed(config.seed)
        self._model, self._config = Transformer(config.model), config
        start_from_run(self._model, run, load_tokenizer(run.tokenizer_path))
        freeze(self._model.named_parameters(), config.optimizer)
        self._optimizer = build_optimizer(self._model.named_parameters(), config.optimizer)
        mixed = config.trainer.resolved_precision == "bf16-mixed"
        self._autocast = partial(torch.autocast, "cpu", torch.bfloat16) if mixed else nullcontext

    def step(self, windows: Tensor) -> float:
        """Take one step on (N, T+1) ids; return its seconds."""
        start = time.perf_counter()
        parts = windows.split(self._config.data.micro_batch_windows(1))
        for part in parts:
            with self._autocast():
                hidden_states = self._model.hidden_states(part[:, :-1])
                loss = next_token_loss(hidden_states, self._model.head, part[:, 1:]) / len(parts)
            loss.backward()
        clip_gradients(self._model.parameters(), self._config.optimizer.gradient_clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.perf_counter() - start


def _train(connection: Connection, config: RunConfig, threads: int) -> None:
    """Take a step for each batch of windows that arrives; at the end send the peak of resident memory, in bytes."""
    torch.set_num_threads(threads)
    training = Training(config)
    for windows in iter(connection.recv, None):
        connection.send(training.step(windows))
    connection.send(status_bytes("VmHWM"))


def measure_training(configs: dict[str, RunConfig], text: TextIds, rounds: int) -> tuple[Timings, dict[str, int]]:
    """Let both take the same steps in turn, after one that does not count; return them and each one's peak bytes."""
    data, context = configs[FULL].data, multiprocessing.get_context("spawn")
    calls: dict[str, Callable[[int], float]] = {}
    ends: dict[str, Connection] = {}
    size = data.sequence_length
    for name, config in configs.items():
        ends[name], other = context.Pipe()
        context.Process(target=_train, args=(other, config, torch.get_num_threads()), daemon=True).start()
        other.close()  # so that a process that fails ends the wait for it
    streams = text.streams(data.global_batch_size, (rounds + 1) * size + 1)

    def call(name: str, number: int) -> float:
        start = (number + 1) * size
        ends[name].send(streams[:, start : start + size + 1].clone())
        return float(ends[name].recv())

    calls = {name: partial(call, name) for name in configs}
    for one in calls.values():
        one(-1)
    with progress_bar("training steps", rounds) as advance:
        timings = run_rounds(calls, rounds, advance)
    for end in ends.values():
        end.send(None)
    return timings, {name: int(end.recv()) for name, end in ends.items()}


@torch.inference_mode()
def measure_decode(base: Path, plug_in: Path, text: TextIds, batch: int, rounds: int) -> Timings:
    """Feed the base, and the base with a plug-in, the same text; the table is on disk."""
    streams = text.streams(batch, PROMPT_TOKENS + rounds + 2)
    prompts, following = streams[:, :PROMPT_TOKENS], streams[:, PROMPT_TOKENS:]
    table = RunDirectory(plug_in).lut_path()
    with ExitStack() as stack:
        alone = stack.enter_context(load_model(base))
        both = stack.enter_context(load_model(base, attach=plug_in))
        steps = {name: steps_here(both if name != BASE else alone, prompts, following) for name in (BASE, COLD, WARM)}

        def one(name: str, number: int) -> float:
            if name == COLD:
                workload.drop(table)
            elif name == WARM and (rows := both.expert_rows(following[:, number : number + 1])) is not None:
                rows.layer_rows(0)  # all rows of these ids are in the page cache then
            return steps[name](number)

        calls = {name: partial(one, name) for name in steps}
        for call in calls.values():
            for number in (rounds, rounds + 1):
                call(number)
        with progress_bar(f"decode steps, batch {batch}", rounds) as advance:
            return run_rounds(calls, rounds, advance)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print, and write JSON and a plot."""
    example = "python -m src.benchmarks.plugin --base runs/smollm2 --attach runs/plugin"
    options = parser("benchmarks.plugin", __doc__ or "", example)
    options.add_argument("--base", type=Path, required=True, help="the run that plug-ins are for")
    options.add_argument("--attach", type=Path, help="a plug-in of it, to measure decoding with")
    options.add_argument("--batches", type=COUNT, nargs="+", default=[1, 8], help="of decoding (default: 1 8)")
    options.add_argument("--rounds", type=COUNT, default=15, help="training steps of each, in turn (default: 15)")
    options.add_argument("--decode-rounds", type=COUNT, default=65, help="decode steps of each (default: 65)")
    options.add_argument("--no-training", action="store_true", help="measure decoding only")
    options.add_argument("overrides", nargs="*", metavar="key=value", help="override a config key of both trainings")
    add_text_options(options)
    given, console = options.parse_args(arguments), Console()
    run = find_run(given.base, "--base")
    text = load_text_ids(given.corpus, given.tokenizer or run.tokenizer_path, run.model_config().vocab_size)
    steps, checks, peaks = dict[str, Timings](), list[Target](), dict[str, int]()
    if not given.no_training:
        timings, peaks = measure_training(training_configs(run.path, given.overrides), text, given.rounds)
        steps["training"] = timings
        checks.append(timings.target("training step: ", PLUG_IN, FULL, TIME))
        checks.append(Target("peak resident memory: plug-in over full", peaks[PLUG_IN] / peaks[FULL], MEMORY))
    if given.attach is not None:
        attached = find_run(given.attach, "--attach").path
        for batch in given.batches:
            timings = measure_decode(run.path, attached, text, batch, given.decode_rounds)
            steps[f"decode, batch {batch}"] = timings
            checks.append(timings.target(f"decode step, batch {batch}: ", COLD, BASE, 1.10))
    document = {"machine": describe_machine(), "peak_bytes": peaks}
    console.print(machine_line(describe_machine()))
    for title, timings in steps.items():
        print_timings(title, timings, console, FULL if title == "training" else BASE)
    for name, peak in peaks.items():
        console.print(f"{name}: peak resident memory {peak / 2**20:,.0f} MiB")
    report(given.output, document, steps, checks, "milliseconds", 1e3, console)


if __name__ == "__main__":
    run_verb(main)
