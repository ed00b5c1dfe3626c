"""`python -m src.benchmarks.figure`: measure and draw what a decode step takes, and what it holds in memory.

The paper's Figure 3 (arXiv:2503.15798) with loads from a real disk instead of bytes over 16 GB/s: Dense, MoE in memory
and offloaded, MoLE in memory and on a cold disk, by batch size. Weights and tables are random, as in
`src.benchmarks.decode`, whose contenders these are. `--shape` measures a shape again, and the JSON keeps the others.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Console

from src.accounting.account import count_parameters
from src.benchmarks.common import COUNT, SHAPES, Timings, add_text_options, describe_machine, model_config
from src.benchmarks.decode import COLD, IN_MEMORY, load_contenders, measure_decode
from src.benchmarks.moe import FEW, MEMORY, RECENT, RECORDED, MoeContenders, OffloadReport, moe_config, print_reports
from src.benchmarks.routing import TRACE, RoutingTrace, find_trace
from src.benchmarks.workload import TextIds, load_text_ids, scratch_directory, write_runs
from src.cli import input_file, output_directory, parser, run_verb
from src.errors import UserError
from src.lut.layout import TableLayout
from src.system.files import atomic_path, free_bytes, write_json

PAPER = ("160m-4e", "160m-16e", "410m-4e")
RESULT = Path(__file__).with_name("latency.json")
SPARE_BYTES = 5.2e9
"""Memory that must stay free above a table, or it is not measured in memory."""
DTYPE, VALUE_BYTES = "bfloat16", 2
STYLES: dict[str, tuple[str, str, str]] = {
    "dense": ("Dense", "#57606a", "-"),
    MEMORY: ("MoE in memory", "#bf8700", "-"),
    f"{FEW}, cold": ("MoE offloaded, two experts kept", "#cf222e", "-"),
    f"{RECENT}, cold": ("MoE offloaded, LRU", "#cf5b3f", "--"),
    f"{RECENT}, cold{RECORDED}": ("MoE offloaded, LRU, trained routing", "#cf5b3f", ":"),
    IN_MEMORY: ("MoLE in memory", "#1a7f64", "-"),
    COLD: ("MoLE from a cold disk", "#0969da", "-"),
}
"""Label, color and line of the contenders that are drawn."""


def disk_bytes(shape: str) -> int:
    """Return the bytes that measuring a shape writes."""
    mole = model_config(shape)
    moe, dense = count_parameters(moe_config(mole)), count_parameters(mole).resident
    return TableLayout.of(mole, DTYPE).table_bytes + VALUE_BYTES * (moe.experts + 2 * dense)


def announce(shapes: Sequence[str], directory: Path, console: Console) -> None:
    """Say what will be written; UserError where the disk is too small for it."""
    sizes, free = [disk_bytes(shape) for shape in shapes], free_bytes(directory)
    parts = ", ".join(f"{shape} {size / 1e9:.1f}" for shape, size in zip(shapes, sizes, strict=True))
    console.print(
        f"writes {sum(sizes) / 1e9:.1f} GB to {directory} ({parts}), {max(sizes) / 1e9:.1f} GB at a time, and removes "
        f"them; {free / 1e9:.1f} GB are free",
        soft_wrap=True,
    )
    if max(sizes) > free:
        raise UserError(
            f"--directory {directory}: {max(sizes) / 1e9:.1f} GB are needed, but {free / 1e9:.1f} GB are free; free "
            "some space, name another disk, or measure a smaller --shape"
        )


def measure_shape(
    shape: str,
    directory: Path,
    text: TextIds,
    trace: RoutingTrace | None,
    batches: Sequence[int],
    rounds: int,
    console: Console,
) -> dict[str, Any]:
    """Return the seconds of every step, the parameters in memory, and what offloaded MoE read; print the latter."""
    config = model_config(shape)
    table_bytes, free = TableLayout.of(config, DTYPE).table_bytes, psutil.virtual_memory().available
    fits = free >= table_bytes + SPARE_BYTES
    left_out = {} if fits else {IN_MEMORY: f"{(table_bytes + SPARE_BYTES) / 1e9:.1f} GB, {free / 1e9:.1f} are free"}
    with scratch_directory(directory) as scratch, ExitStack() as stack:
        mole, dense = write_runs(scratch, config, DTYPE, None, with_experts=False)
        contenders = load_contenders(stack, mole, dense, "auto", (COLD, IN_MEMORY) if fits else (COLD,))
        models = contenders.models
        moe = MoeContenders(stack, models["dense"], models[COLD], scratch / "experts", trace, only_cold=True)
        timings, reports = dict[int, Timings](), dict[int, Mapping[str, OffloadReport]]()
        for batch in batches:
            timings[batch] = measure_decode(contenders, text, batch, rounds, moe)
            reports[batch] = moe.reports(batch)
        parameters = {name: count(model) for name, model in models.items()}
        parameters |= {name: count(moe.contenders[MEMORY].model) for name in moe.contenders}
    print_reports(timings, reports, COLD, console)
    if fits:
        parameters[IN_MEMORY] += table_bytes // VALUE_BYTES
    per_expert, every = moe.expert_bytes // VALUE_BYTES, moe.config.num_layers * moe.config.num_experts
    kept = {FEW: 2 * moe.config.num_layers, RECENT: moe.capacity}
    for name in parameters:
        for policy, experts in kept.items():
            parameters[name] -= per_expert * (every - experts) if name.startswith(policy) else 0
    return {
        "machine": describe_machine(),
        "parameters_in_memory": parameters,
        "left_out": left_out,
        "routing": None if trace is None else trace.about,
        "seconds": {
            str(batch): {name: [round(second, 6) for second in found] for name, found in each.seconds.items()}
            for batch, each in timings.items()
        },
        "offloaded": {str(batch): {name: asdict(one) for name, one in each.items()} for batch, each in reports.items()},
    }


def count(model: Any) -> int:
    """Return the number of parameters of a model."""
    return sum(weight.numel() for weight in model.parameters())


def read_parts(path: Path) -> dict[str, Any]:
    """Return the shapes that a result holds; UserError when it is something else."""
    if not path.exists():
        return {}
    try:
        parts = json.loads(path.read_text("utf-8"))["shapes"]
        return {str(shape): dict(part) for shape, part in parts.items() if part["seconds"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no result of this program ({error!r}); name another file with --output") from error


Medians = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Shape -> contender -> batch size -> milliseconds."""


def medians(parts: Mapping[str, Any]) -> Medians:
    """Return the median milliseconds of the contenders that are drawn."""
    return {
        shape: {
            name: {batch: round(1e3 * statistics.median(by[name]), 3) for batch, by in part["seconds"].items()}
            for name in STYLES
            if all(name in by for by in part["seconds"].values())
        }
        for shape, part in sorted(parts.items(), key=lambda item: SHAPES.index(item[0]))
    }


def draw(parts: Mapping[str, Any]) -> Figure:
    """Draw a panel per shape: milliseconds against batch size, with the parameters in memory in its legend."""
    drawn = medians(parts)
    figure = Figure(figsize=(4.6 * len(drawn), 5.2), dpi=140, layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for panel, (shape, series) in zip(panels, drawn.items(), strict=True):
        _draw_shape(panel, shape, series, parts[shape]["parameters_in_memory"])
    panels[0].set_ylabel("milliseconds per decode step", fontsize=9)
    return figure


def _draw_shape(
    panel: Axes, shape: str, series: Mapping[str, Mapping[str, float]], parameters: Mapping[str, int]
) -> None:
    for name, by_batch in series.items():
        label, color, line = STYLES[name]
        amount = f"{label}: {parameters[name] / 1e6:,.0f} M"
        panel.plot(list(by_batch), list(by_batch.values()), color=color, linestyle=line, marker="o", ms=4, label=amount)
    size, experts = shape.removesuffix("e").split("-")
    moe_experts = moe_config(model_config(shape)).num_experts
    panel.set_title(f"{size.upper()}: MoLE-{experts}E, MoE-{moe_experts}E", fontsize=10)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(FuncFormatter(_tick))
    panel.yaxis.set_minor_formatter(FuncFormatter(_tick))
    panel.set_xlabel("batch size", fontsize=9)
    panel.grid(axis="y", which="both", color="#d0d7de", linewidth=0.5)
    panel.tick_params(which="both", labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(
        title="parameters in memory", loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False, fontsize=8
    )


def _tick(value: float, _position: int | None = None) -> str:
    """Return the number at a tick of a logarithmic axis, where it starts with 1, 2, 3 or 5."""
    return f"{value:g}" if f"{value:e}"[0] in "1235" else ""


def save(parts: Mapping[str, Any], output: Path) -> None:
    """Write the JSON, and the PNG beside it, which records the values it was drawn from."""
    write_json(output, {"shapes": parts})
    with atomic_path(output.with_suffix(".png")) as temporary:
        draw(parts).savefig(temporary, format="png", metadata={"Description": json.dumps(medians(parts))})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the shapes, one after another, and write JSON and PNG after each."""
    options = parser("benchmarks.figure", __doc__ or "", "python -m src.benchmarks.figure --shape 160m-4e")
    options.add_argument(
        "--shape", choices=SHAPES, nargs="+", default=list(PAPER), help=f"default: {' '.join(PAPER)}; others stay"
    )
    options.add_argument("--batches", type=COUNT, nargs="+", default=[1, 8, 32], help="default: 1 8 32")
    options.add_argument("--rounds", type=COUNT, default=33, help="interleaved rounds (default: 33)")
    options.add_argument(
        "--directory", type=output_directory, default=Path("runs"), help="disk to measure (default: runs)"
    )
    options.add_argument(
        "--routing",
        type=input_file,
        metavar="FILE.npz",
        help=f"choices of a trained MoE (default: {TRACE.name}, if any)",
    )
    options.add_argument("--draw", action="store_true", help="only draw what the result holds")
    add_text_options(options)
    options.set_defaults(output=RESULT)
    given, console = options.parse_args(arguments), Console()
    parts = read_parts(given.output)
    if given.draw:
        if not parts:
            raise UserError(f"--draw: {given.output} holds no shape yet; measure one first")
        save(parts, given.output)
        return
    text = load_text_ids(given.corpus, given.tokenizer, model_config(given.shape[0]).vocab_size)
    trace = find_trace(given.routing, console)
    announce(given.shape, given.directory, console)
    for shape in given.shape:
        parts[shape] = measure_shape(shape, given.directory, text, trace, given.batches, given.rounds, console)
        for name, reason in parts[shape]["left_out"].items():
            console.print(f"{shape}: {name} is left out; it takes {reason}", soft_wrap=True)
        save(parts, given.output)
        for name, by_batch in medians(parts)[shape].items():
            steps = ", ".join(f"{value:.1f} ms at batch {batch}" for batch, value in by_batch.items())
            console.print(f"{shape}: {name}: {steps}", soft_wrap=True)


if __name__ == "__main__":
    run_verb(main)
