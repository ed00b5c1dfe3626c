"""`python -m src.benchmarks.figure`: draw the README's figure from the decode table in `src/benchmarks/README.md`.

The page is the only place where the figures are kept; the PNG records the values it was drawn from. Times nothing.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from src.cli import input_file, output_file, parser, run_verb
from src.errors import UserError
from src.system.files import atomic_path

HERE = Path(__file__).parent
OVER_DENSE = ", over Dense"
DENSE_COLOR, COLORS = "#8c959f", ("#0969da", "#1a7f64", "#bf8700", "#cf5b3f")

Columns = Mapping[str, Mapping[str, Sequence[float]]]
"""Machine -> row of the table -> a value per batch size; the row `batch` holds these sizes."""


def read_decode_table(page: Path) -> Columns:
    """Return Dense's milliseconds and every row `..., over Dense`; UserError when the page has no such table."""
    found = re.search(r"^\| \| (.+ batch .+) \|\n\|[-|]+\|\n((?:\|.+\|\n)+)", page.read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise UserError(f"{page}: no table whose first heading is like `| | MACHINE, batch 1 | 8 |`")
    columns: dict[str, dict[str, list[float]]] = {}
    machines: list[str] = []
    for heading in found[1].split(" | "):
        machine, named, batch = heading.rpartition(", batch ")
        machines.append(machine if named else machines[-1])
        columns.setdefault(machines[-1], {}).setdefault("batch", []).append(float(batch))
    for line in found[2].splitlines():
        label, *cells = line.strip("| ").split(" | ")
        if label == "Dense" or label.endswith(OVER_DENSE):
            for machine, cell in zip(machines, cells, strict=True):
                columns[machine].setdefault(label.removesuffix(OVER_DENSE), []).append(float(cell.split()[0]))
    return columns


def draw(columns: Columns) -> Figure:
    """Draw one panel per machine: the time of a decode step over Dense, by batch size."""
    figure = Figure(figsize=(8.4, 3.3), dpi=140, layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for panel, (machine, rows) in zip(panels, columns.items(), strict=True):
        _draw_machine(panel, machine, rows)
    panels[0].set_ylabel("time of a decode step (Dense = 1)", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


def _draw_machine(panel: Axes, machine: str, rows: Mapping[str, Sequence[float]]) -> None:
    series = {name: values for name, values in rows.items() if name not in ("batch", "Dense")}
    bars = {"Dense": [1.0] * len(rows["batch"]), **{f"MoLE, {name}": values for name, values in series.items()}}
    width = 0.8 / len(bars)
    for index, (name, values) in enumerate(bars.items()):
        places = [group + (index - (len(bars) - 1) / 2) * width for group in range(len(values))]
        color = COLORS[index - 1] if index else DENSE_COLOR
        drawn = panel.bar(places, values, width * 0.92, color=color, label=name)
        panel.bar_label(drawn, fmt="%.2f", padding=2, fontsize=8, color="#24292f")
    ticks = [f"batch {batch:g}\nDense: {time:g} ms" for batch, time in zip(rows["batch"], rows["Dense"], strict=True)]
    panel.set_xticks(range(len(ticks)), ticks)
    panel.set_title(f"2 CPU cores, {machine}", fontsize=10)
    panel.tick_params(length=0, labelsize=9)
    panel.margins(y=0.1)
    panel.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the table and write the PNG."""
    options = parser("benchmarks.figure", __doc__ or "", "python -m src.benchmarks.figure --output decode.png")
    options.add_argument(
        "--page", type=input_file, default=HERE / "README.md", metavar="FILE.md", help="where the table is"
    )
    options.add_argument(
        "--output", type=output_file, default=HERE / "decode.png", metavar="FILE.png", help="what to write"
    )
    given = options.parse_args(arguments)
    columns = read_decode_table(given.page)
    with atomic_path(given.output) as temporary:
        draw(columns).savefig(temporary, format="png", metadata={"Description": json.dumps(columns)})


if __name__ == "__main__":
    run_verb(main)
