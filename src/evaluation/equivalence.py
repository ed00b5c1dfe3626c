"""How close two forms of a model are: differences of logits, and greedy continuations.

N windows, B batch, T tokens, V vocabulary.

Controls: a model whose rows are wrong on purpose, to show what the table is worth.

U unique token ids, E experts, D hidden, V vocabulary.

What each precision of a table would cost this model: rows recoded on their way, exactly as a table stores them.

U unique token ids, E experts, D hidden.
"""

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from src.errors import LutError
from src.evaluation.held_out import HeldOut
from src.evaluation.perplexity import Mask, no_mask
from src.inference import InferenceModel
from src.inference.generation import generate
from src.lut.codecs import CODECS, Codec
from src.lut.layout import TableLayout
from src.model import Transformer
from src.model.experts import ExpertSource, LayerRows

NEAR_TIE = 1e-4
"""Two best logits closer than this may swap by rounding alone."""


@dataclass(frozen=True, kw_only=True)
class LogitDistance:
    """How far the logits of two forms are apart on the same windows."""

    max_abs: float
    mean_abs: float
    top1_agreement: float
    """Share of positions where both forms would pick the same next token."""
    tokens: int

    def to_dict(self) -> dict[str, float]:
        """Return all figures by name."""
        return asdict(self)


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
        """Whether every prompt is identical or parts at a near-tie."""
        return self.identical + self.near_ties == self.prompts

    def to_dict(self) -> dict[str, float | bool]:
        """Return all figures by name."""
        return {**asdict(self), "holds": self.holds}


@torch.no_grad()
def logit_distance(
    reference: Transformer,
    other: Transformer,
    windows: Tensor,
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
    mask: Mask = no_mask,
) -> LogitDistance:
    """Compare next-token logits on `windows` (N, T) int64."""
    largest, total, agreed, count = 0.0, 0.0, 0, 0
    for token_ids in windows.split(batch_size):
        visible = mask(token_ids)
        expected = reference(token_ids, attention_mask=visible)  # (B, T, V)
        found = other(token_ids, attention_mask=visible)
        difference = (expected.double() - found.double()).abs()
        largest = max(largest, difference.max().nan_to_num(nan=math.inf).item())  # NaN is no agreement
        total += difference.sum().item()
        agreed += int((expected.argmax(-1) == found.argmax(-1)).sum())
        count += difference.numel()
        if progress is not None:
            progress(len(token_ids))
    tokens = windows.numel()
    return LogitDistance(max_abs=largest, mean_abs=total / count, top1_agreement=agreed / tokens, tokens=tokens)


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


class AlteredRows(nn.Module):
    """A source in place of a model's own whose rows are changed on the way."""

    def __init__(self, source: ExpertSource) -> None:
        """Alter the rows of `source`."""
        super().__init__()
        self.source = source

    def rows(self, token_ids: Tensor, token_embeddings: Tensor) -> LayerRows:
        """Return the source's rows; subclasses change them."""
        return self.source.rows(token_ids, token_embeddings)

    def prefetch(self, token_ids: Tensor) -> None:
        """Fetch nothing ahead: which ids come next is decided in `rows`."""


class ZeroedRows(AlteredRows):
    """Every row replaced by zeros: the model without its table."""

    def rows(self, token_ids: Tensor, token_embeddings: Tensor) -> LayerRows:
        """Return zeros of the right shape."""
        layer_rows = self.source.rows(token_ids, token_embeddings)
        return lambda layer: torch.zeros_like(layer_rows(layer))


class PermutedRows(AlteredRows):
    """Every id given the row of another id: the model with a table of the wrong words."""

    def __init__(self, source: ExpertSource, embedding: Tensor, seed: int = 0) -> None:
        """Draw a permutation of the ids of `embedding` (V, D)."""
        super().__init__(source)
        self.embedding = embedding
        self.permutation = torch.randperm(len(embedding), generator=torch.Generator().manual_seed(seed))

    def rows(self, token_ids: Tensor, token_embeddings: Tensor) -> LayerRows:
        """Return the rows of the permuted ids."""
        others = self.permutation.to(token_ids.device)[token_ids]
        return self.source.rows(others, self.embedding[others])


@contextmanager
def experts_replaced(model: Transformer, source: AlteredRows) -> Generator[Transformer]:
    """Lend the model another source of rows."""
    original, model.experts = model.experts, source
    try:
        yield model
    finally:
        model.experts = original


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

    def to_dict(self) -> dict[str, object]:
        """Return everything as plain values."""
        return asdict(self)


class RecodedRows(AlteredRows):
    """Every row encoded and decoded: what a table of that precision would give."""

    def __init__(self, source: ExpertSource, recoding: Codec) -> None:
        """Recode the rows of `source`."""
        super().__init__(source)
        self.recoding = recoding

    def rows(self, token_ids: Tensor, token_embeddings: Tensor) -> LayerRows:
        """Return the source's rows after a round trip through the codec."""
        layer_rows = self.source.rows(token_ids, token_embeddings)

        def recoded(layer: int) -> Tensor:
            rows = layer_rows(layer)
            return self.recoding.decode(self.recoding.encode(rows), rows.shape[-1]).to(rows.dtype)

        return recoded


def precision_costs(
    reference: InferenceModel,
    text: HeldOut,
    compared: Tensor,
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]],
) -> Iterator[PrecisionCost]:
    """Yield the cost of every precision that this hidden size can be packed in, against float32 rows.

    `reference` has exact rows and computes in float32; `compared` (N, T) int64 are the windows whose logits are
    compared, all of `text` is scored.
    """
    assert reference.experts is not None
    exact, plain = reference.experts, _twin(reference)
    base = 0.0
    for precision in CODECS:
        try:
            layout = _layout(reference, precision)
            row_bytes = layout.row_bytes
        except LutError:  # a block that does not divide this hidden size
            continue
        with experts_replaced(reference, RecodedRows(exact, layout.codec)) as recoded:
            with progress(f"scoring {precision} rows", len(text.windows)) as advance:
                loss = text.score(recoded, progress=advance).loss
            distance = logit_distance(plain, recoded, compared, mask=text.mask)
        base = loss if precision == "float32" else base
        yield PrecisionCost(
            precision=precision, bytes_per_token=row_bytes, loss=loss, rise=loss - base, logits=distance
        )


def _twin(model: InferenceModel) -> InferenceModel:
    """Return a model that shares all weights with `model`, and keeps its experts when those of `model` are replaced."""
    with torch.device("meta"):
        twin = InferenceModel(model.config, with_experts=False)
    twin.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("experts.")}, assign=True
    )
    twin.experts = model.experts
    return twin.eval()


def plot_costs(costs: list[PrecisionCost], title: str, path: Path) -> None:
    """Draw held-out loss against bytes per token into a PNG."""
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


def _layout(model: InferenceModel, precision: str) -> TableLayout:
    config = model.config
    return TableLayout(
        vocab_size=config.vocab_size,
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        hidden_size=config.hidden_size,
        precision=precision,
    )
