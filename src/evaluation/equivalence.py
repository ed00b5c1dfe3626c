"""How close two forms of a model are, what a model is worth without its rows, and what each precision costs.

Rows that are altered on purpose (zeroed, permuted, recoded as a table stores them) are passed to the model in place of
its own; the model itself never changes.

N windows, B batch, T tokens, U unique token ids, E experts, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from src.errors import LutError
from src.evaluation.held_out import HeldOut
from src.evaluation.perplexity import Mask, RowsOf, no_mask
from src.inference import InferenceModel
from src.inference.generation import generate
from src.lut.codecs import CODECS, Codec
from src.lut.layout import TableLayout
from src.model import Transformer
from src.model.experts import ExpertRows
from src.system.console import Advance, Progress, no_advance

NEAR_TIE = 1e-4
"""Two best logits closer than this may swap by rounding alone."""
LOGIT_POSITIONS = 512
"""Positions whose logits, in float64 too, are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class LogitDistance:
    """How far the logits of two forms are apart on the same windows."""

    max_abs: float
    mean_abs: float
    top1_agreement: float
    """Share of positions where both forms would pick the same next token."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class GreedyComparison:
    """Greedy continuations of two forms from the same prompts."""

    prompts: int
    new_tokens: int
    identical: int
    """Prompts whose continuations agree token for token."""
    near_ties: int
    """Prompts that part first where the reference's two best logits are closer than `NEAR_TIE`."""
    widest_gap: float
    """Largest gap between the reference's two best logits at a first parting; 0 when nothing parts."""

    @property
    def holds(self) -> bool:
        return self.identical + self.near_ties == self.prompts


@torch.no_grad()
def logit_distance(
    reference: Transformer,
    other: Transformer,
    windows: Tensor,
    *,
    rows_of: RowsOf | None = None,
    batch_size: int = 8,
    progress: Advance = no_advance,
    mask: Mask = no_mask,
) -> LogitDistance:
    """Compare next-token logits on `windows` (N, T) int64; `other` mixes `rows_of` the ids where that is given."""
    largest, total, agreed = 0.0, 0.0, 0
    for token_ids in windows.split(batch_size):
        visible, rows = mask(token_ids), None if rows_of is None else rows_of(token_ids)
        expected = reference.hidden_states(token_ids, attention_mask=visible).flatten(0, 1)  # (B*T, D)
        found = other.trunk(token_ids, attention_mask=visible, expert_rows=rows).hidden_states.flatten(0, 1)
        for pair in zip(expected.split(LOGIT_POSITIONS), found.split(LOGIT_POSITIONS), strict=True):
            logits, other_logits = reference.head(pair[0]), other.head(pair[1])  # (positions, V)
            difference = (logits.double() - other_logits.double()).abs()
            largest = max(largest, difference.max().nan_to_num(nan=math.inf).item())  # NaN is no agreement
            total += difference.sum().item()
            agreed += int((logits.argmax(-1) == other_logits.argmax(-1)).sum())
        progress(len(token_ids))
    tokens = windows.numel()
    mean = total / (tokens * reference.config.vocab_size)
    return LogitDistance(max_abs=largest, mean_abs=mean, top1_agreement=agreed / tokens, tokens=tokens)


@torch.no_grad()
def compare_greedy(reference: Transformer, other: Transformer, prompts: Tensor, *, new_tokens: int) -> GreedyComparison:
    """Continue `prompts` (N, T) greedily in both forms and look at where they part."""
    expected = generate(reference, prompts, max_new_tokens=new_tokens)
    found = generate(other, prompts, max_new_tokens=new_tokens)
    identical, near_ties, widest = 0, 0, 0.0
    for row in range(len(prompts)):
        parted = (expected[row] != found[row]).nonzero()
        if not len(parted):
            identical += 1
            continue
        prefix = expected[row : row + 1, : int(parted[0])]
        best = reference(prefix)[0, -1].topk(2).values
        gap = float(best[0] - best[1])
        near_ties += gap < NEAR_TIE
        widest = max(widest, gap)
    return GreedyComparison(
        prompts=len(prompts), new_tokens=new_tokens, identical=identical, near_ties=near_ties, widest_gap=widest
    )


def altered_rows(model: Transformer, change: Callable[[Tensor], Tensor]) -> RowsOf:
    """Return a source of rows like the model's own, with `change` applied to those of each layer (U, E, D)."""

    def rows_of(token_ids: Tensor) -> ExpertRows | None:
        rows = model.expert_rows(token_ids)
        if rows is None:
            return None

        def layer_rows(layer: int) -> Tensor:
            return change(rows.layer_rows(layer))

        return rows._replace(layer_rows=layer_rows)

    return rows_of


def zeroed_rows(model: Transformer) -> RowsOf:
    """Every row replaced by zeros: the model without its table."""
    return altered_rows(model, torch.zeros_like)


def permuted_rows(model: Transformer, seed: int = 0) -> RowsOf:
    """Every id given the row of another id: the model with a table of the wrong words."""
    permutation = torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(seed))
    return lambda token_ids: model.expert_rows(permutation.to(token_ids.device)[token_ids])


def recoded_rows(model: Transformer, recoding: Codec) -> RowsOf:
    """Every row encoded and decoded: what a table of that precision would give."""
    return altered_rows(model, lambda rows: recoding.decode(recoding.encode(rows), rows.shape[-1]).to(rows.dtype))


@dataclass(frozen=True, kw_only=True)
class PrecisionCost:
    """A precision against float32 rows of the same model."""

    precision: str
    bytes_per_token: int
    loss: float
    """Held-out loss in nats."""
    rise: float
    """Of that loss over float32's."""
    logits: LogitDistance


def precision_costs(
    reference: InferenceModel, text: HeldOut, compared: Tensor, progress: Progress
) -> Iterator[PrecisionCost]:
    """Yield the cost of every precision that this hidden size can be packed in, against float32 rows.

    `reference` has exact rows and computes in float32; `compared` (N, T) int64 are the windows whose logits are
    compared, all of `text` is scored.
    """
    base = 0.0
    for precision in CODECS:
        try:
            layout = TableLayout.of(reference.config, precision)
            row_bytes = layout.row_bytes
        except LutError:  # a block that does not divide this hidden size
            continue
        recoded = recoded_rows(reference, layout.codec)
        with progress(f"scoring {precision} rows", len(text.windows)) as advance:
            loss = text.score(reference, progress=advance, rows_of=recoded).loss
        distance = logit_distance(reference, reference, compared, mask=text.mask, rows_of=recoded)
        base = loss if precision == "float32" else base
        yield PrecisionCost(
            precision=precision, bytes_per_token=row_bytes, loss=loss, rise=loss - base, logits=distance
        )


def plot_costs(costs: list[PrecisionCost], title: str, path: Path) -> None:
    """Draw held-out loss against bytes per token into a PNG."""
    from matplotlib.figure import Figure  # takes a second to import, which most verbs do without

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([cost.bytes_per_token for cost in costs], [cost.loss for cost in costs], "o", color="tab:blue")
    for cost in costs:
        label = f"{cost.precision}\n{cost.rise:+.1e}" if cost.rise else cost.precision
        axes.annotate(label, (cost.bytes_per_token, cost.loss), xytext=(6, 6), textcoords="offset points", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="bytes read per token", ylabel="held-out loss (nats per token)", title=title)
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150, format="png")
