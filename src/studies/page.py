"""The page of a study, `README.md` beside its definition: Markdown from the definition and `results.csv` alone."""

import math
from collections.abc import Callable, Iterator, Sequence

from src.studies.adaptation import domains, forgotten, shares
from src.studies.cells import best_value
from src.studies.definition import Search, Study
from src.studies.figures import CURVES, MEMORY, kind, main_figure
from src.studies.markdown import differences, line, millions, number, rise, signed, table, with_error
from src.studies.rows import FREQUENCIES, Row, find, read_rows
from src.studies.summary import Summary

_FIGURES = ("nats per token", "95 % interval", "p")
_HOW_TO_READ = """\
A negative difference means that the first arm has the lower loss. An interval within the smallest difference of
interest is too small to matter; one that holds 0 and reaches beyond it shows no difference at this resolution, which
leaves the hypothesis undecided. The test is Student's paired t test over seeds; p is not corrected for the number of
hypotheses."""
_ABOUT_LOSSES = """

Mean and standard error over seeds. A seed decides initial weights and the order of windows, which is the same in every
arm; the held-out text is the same in every cell."""
_ABOUT_COSTS = """

Parameters: trained; in memory at inference, with experts or table offloaded; offloaded. Read per token: of what is
offloaded, in 16 bit, for MoE at most, with no expert in memory. FLOPs: experts that read embeddings count once for each
distinct token of a micro-batch, as they ran. Seconds: of training, at the median speed of its steps; other work on the
machine slows them, so they are no benchmark."""
_ABOUT_CONTROLS = """

The loss when a trained model's rows are replaced, and its rise: zeros take the experts away, a permutation gives each
token the row of another."""


def page_text(summary: Summary) -> str:
    """Return the page's Markdown."""
    return "\n\n".join(_sections(summary)) + "\n"


def _sections(summary: Summary) -> Iterator[str]:
    study = summary.study
    yield f"# {study.title}"
    yield (
        f"Written by `python -m src.study --study configs/studies/{study.name}/study.yaml --report` from "
        "[the definition](study.yaml) and [its results](results.csv)."
    )
    yield f"## What was asked\n\n{study.question}"
    if not summary.arms:
        yield "No cell has a result yet."
        return
    yield f"## What was found\n\n{shares(summary)}{_answers(summary)}"
    against = "weights in memory" if main_figure(summary) == MEMORY else "loss on general text"
    yield f"![Held-out loss against {against}]({main_figure(summary)})"
    yield f"## Losses\n\n{_losses(summary)}"
    yield f"![Validation loss over steps]({CURVES})"
    yield f"## Differences from {study.arms[study.baseline].label}\n\n{_differences(summary)}"
    yield f"## Costs\n\n{_costs(summary)}"
    if summary.has_general_losses:
        yield f"## What is forgotten\n\n{forgotten(summary)}"
        yield f"## What one domain costs, and what ten do\n\n{domains(summary)}"
    if controls := _controls(summary):
        yield f"## What the rows are worth\n\n{controls}"
    for prefix, token in (("loss_seen", "predicted token"), ("loss_after", "token before it")):
        if losses := _frequencies(summary, prefix):
            yield f"## Loss by how often the {token} occurs in the training text\n\n{losses}"
    if study.search is not None:
        yield f"## The search of `{study.search.key}`\n\n{_search(study, study.search, summary.rows)}"
    if study.notes:
        yield f"## The text\n\n{study.notes}"
    yield f"## How it was run\n\n{_provenance(summary)}"


def _answers(summary: Summary) -> str:
    study = summary.study
    lines = table("hypothesis, written before the runs", "expected", "found", "", *_FIGURES, texts=4)
    for item in study.hypotheses:
        found = summary.compare(item.arm, item.than, on_general=item.on_general)
        names = f"{study.arms[item.arm].label} against {study.arms[item.than].label}"
        names += ", on general text" if item.on_general else ""
        over = found.over_seeds
        figures = differences(over)
        test = f" ({found.test})" if "window" in found.test else ""
        answer = f"**{summary.answer(item)}**"
        lines.append(line(f"{names}. {item.because}", item.expect, f"{found.verdict}{test}", answer, *figures))
    smallest = f"\n\nThe smallest difference of interest is {study.smallest_difference:g} nats per token. "
    return "\n".join(lines) + smallest + _HOW_TO_READ + _other_lengths(summary)


def _other_lengths(summary: Summary) -> str:
    """Say in which order the arms end that trained on more or fewer tokens than the baseline."""
    names = {name for pair in summary.comparisons() for name in pair if summary.study.baseline not in pair}
    arms = sorted((summary.arms[name] for name in names), key=lambda arm: arm.mean(lambda row: row.held_out_loss))
    found = ""
    for tokens in sorted({arm.rows[0].tokens for arm in arms}):
        same = [arm for arm in arms if arm.rows[0].tokens == tokens]
        order = "; ".join(f"{arm.arm.label} {number(arm.mean(lambda row: row.held_out_loss))}" for arm in same)
        seeds = max(len(arm.rows) for arm in same)
        found += f"\n\nAt {tokens:,} tokens ({seeds} seed{'s' if seeds > 1 else ''}), from best to worst: {order}."
    return found


def _losses(summary: Summary) -> str:
    lines = table("", "seeds", "held-out loss, nats per token", "bits per byte", "from the table")
    for arm in summary.arms.values():
        lookup = arm.mean(lambda row: row.lookup_loss)
        lines.append(
            line(
                arm.arm.label,
                ", ".join(str(row.seed) for row in arm.rows),
                with_error(arm, lambda row: row.held_out_loss),
                with_error(arm, lambda row: row.bits_per_byte),
                number(lookup),
            )
        )
    missing = f"\n\nNo result yet: {', '.join(summary.missing)}." if summary.missing else ""
    return "\n".join(lines) + _ABOUT_LOSSES + missing


def _differences(summary: Summary) -> str:
    study = summary.study
    seeds = sorted({row.seed for arm in summary.arms.values() for row in arm.rows})
    windows = 0
    lines = table("", "verdict", *_FIGURES, *(f"seed {seed}, by window" for seed in seeds), texts=2)
    for name, than in summary.comparisons():
        found = summary.compare(name, than)
        over = found.over_seeds
        figures = differences(over)
        within = [found.by_window.get(seed) for seed in seeds]
        cells = ["" if item is None else signed(item.mean, item.stderr) for item in within]
        label = study.arms[name].label + ("" if than == study.baseline else f" against {study.arms[than].label}")
        lines.append(line(label, found.verdict, *figures, *cells))
        windows = max(windows, *(item.pairs for item in found.by_window.values()), 0)
    return "\n".join(lines) + (
        "\n\nNats per token, with standard errors, at equal tokens. Over seeds: paired by seed, Student's paired t "
        f"test. By window: within one seed, paired by held-out window ({windows} of them); neighboring windows may be "
        "from one document, so these errors are on the small side, and they say nothing about other seeds."
    )


def _costs(summary: Summary) -> str:
    headings = ("trained", "resident", "offloaded", "read per token", "training FLOPs", "tokens", "seconds")
    lines = table("", *headings)
    for arm in summary.arms.values():
        row = arm.rows[0]
        lines.append(
            line(
                arm.arm.label,
                millions(row.trained_parameters),
                millions(row.resident_parameters),
                millions(row.offloaded_parameters),
                f"{row.bytes_per_token:,} B" if row.bytes_per_token else "0",
                "" if math.isnan(flops := arm.mean(lambda row: row.training_flops)) else f"{flops:.3g}",
                f"{row.tokens:,}",
                f"{arm.mean(lambda row: row.seconds):,.0f}",
            )
        )
    return "\n".join(lines) + _ABOUT_COSTS


def _controls(summary: Summary) -> str:
    arms = [arm for arm in summary.arms.values() if kind(arm) == "mole"]
    if not arms:
        return ""
    lines = table("", "held-out loss", "rows replaced by zeros", "rows permuted over ids", "router entropy, nats")
    for arm in arms:
        lines.append(
            line(
                arm.arm.label,
                number(arm.mean(lambda row: row.held_out_loss)),
                rise(arm, lambda row: row.zeroed_loss),
                rise(arm, lambda row: row.permuted_loss),
                number(arm.mean(lambda row: row.router_entropy), 3),
            )
        )
    return "\n".join(lines) + _ABOUT_CONTROLS


def _frequencies(summary: Summary, prefix: str) -> str:
    names = [f"{prefix}_{least}" for least in FREQUENCIES]
    used = [name for name in names if any(math.isfinite(getattr(row, name)) for row in summary.rows)]
    if not used:
        return ""
    titles = [_band(int(name.rpartition("_")[2])) for name in used]
    lines = table("", *titles)
    for arm in summary.arms.values():
        lines.append(line(arm.arm.label, *(number(arm.mean(_getter(name)), 3) for name in used)))
    return "\n".join(lines) + "\n\nNats per token, mean over seeds."


def _getter(name: str) -> Callable[[Row], float]:
    return lambda row: getattr(row, name)


def _band(least: int) -> str:
    return "never" if least == 0 else f"{least:,} to {10 * least - 1:,} times"


def _search(study: Study, search: Search, own_rows: Sequence[Row]) -> str:
    elsewhere = search.study != study.path.resolve()
    rows = read_rows(search.study.parent / "results.csv") if elsewhere else own_rows
    if elsewhere:
        chosen = {family: best_value(search, family, rows) for family in search.families}
        values = ", ".join(f"{family} {value}" for family, value in chosen.items() if value is not None)
        return f"Values are those of [another study](../{search.study.parent.name}/README.md): {values or 'not yet'}."
    tried = sorted({value for values in search.values.values() for value in values}, key=float)
    lines = table("family, searched on", *tried, "used")
    for family, arm in search.families.items():
        found = [find(rows, arm, search.seed, value) for value in tried]
        best, own = best_value(search, family, rows), search.values[family]
        losses = ["" if row is None else number(row.held_out_loss) for row in found]
        edge = " (at the edge of what was tried)" if best in (own[0], own[-1]) else ""
        lines.append(line(f"{family}, {study.arms[arm].label}", *losses, f"{best or ''}{edge}"))
    changed = f", and with {', '.join(f'`{text}`' for text in search.overrides)}" if search.overrides else ""
    return "\n".join(lines) + (
        f"\n\nHeld-out loss with seed {search.seed}, which is of no reported cell{changed}. Every arm of a family uses "
        "the best value of its family."
    )


def _provenance(summary: Summary) -> str:
    rows = summary.rows
    machines = sorted({f"{row.machine}, {row.threads} thread{'s' if row.threads > 1 else ''} a cell" for row in rows})
    corpora = sorted({row.corpus for row in rows})
    by_commit: dict[str, list[str]] = {}
    for row in rows:
        cell = f"{row.arm}{f'-{row.value}' if row.value else ''}-s{row.seed}"
        by_commit.setdefault(row.commit, []).append(cell)
    lines = [
        f"- {len(rows)} cells; {'; '.join(machines)}",
        f"- corpus {', '.join(corpora)}" + (" (only cells on the same one are compared)" if corpora[1:] else ""),
    ]
    most = max(by_commit, key=lambda commit: len(by_commit[commit]))
    lines.append(f"- commit {most}" + (", but for the following cells" if len(by_commit) > 1 else ""))
    lines += [f"- commit {commit}: {', '.join(cells)}" for commit, cells in by_commit.items() if commit != most]
    return "\n".join(lines)
