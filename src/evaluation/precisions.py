"""What each precision of a table would cost this model: rows recoded on their way, exactly as a table stores them.

U unique token ids, E experts, D hidden.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from src.errors import LutError
from src.evaluation.controls import AlteredRows, experts_replaced
from src.evaluation.equivalence import LogitDistance, logit_distance
from src.evaluation.held_out import HeldOut
from src.evaluation.perplexity import score_windows
from src.inference import InferenceModel
from src.lut.layout import TableLayout
from src.lut.quantization import CODECS, Codec, codec
from src.model.experts import ExpertSource, LayerRows


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
        with experts_replaced(reference, RecodedRows(exact, codec(precision))) as recoded:
            with progress(f"scoring {precision} rows", len(text.windows)) as advance:
                loss = score_windows(recoded, text.windows, text.byte_lengths, progress=advance).loss
            distance = logit_distance(plain, recoded, compared)
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
