"""Figures of the routers, for the dashboard and for a run's `figures/` folder.

E experts, C choices of a router (E, and one more with a null expert), L layers with experts.
"""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from tokenizers import Tokenizer

from src.evaluation.routing_view import RoutingView

DPI = 120
SHOWN_LAYERS, SHOWN_EXPERTS, SHOWN_TOKENS = 4, 8, 6
"""How much of the tokens by expert fits into a figure; `expert_token_rows` has the rest."""
_MOST_LABELS = 320
_TOKEN_WIDTH = 14


def probability_heat_map(view: RoutingView, step: int) -> Figure:
    """Plot mean router probability by layer and expert; the title names collapsed layers."""
    num_layers, num_experts = view.probabilities.shape  # with the null expert, the last
    figure = Figure(figsize=(2.8 + 0.62 * num_experts, 1.9 + 0.36 * num_layers), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(view.probabilities.tolist(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set(xlabel="expert", ylabel="layer", xticks=range(num_experts))
    axes.set_yticks(range(num_layers), map(str, view.layers))
    if num_layers * num_experts <= _MOST_LABELS:
        _label_cells(axes, view)
    effective = axes.secondary_yaxis("right")
    effective.set_yticks(range(num_layers), [f"{value:.1f}" for value in view.effective_experts.tolist()])
    effective.set_ylabel(f"effective experts, of {num_experts}")
    figure.colorbar(image, ax=axes, label="mean router probability")
    verdict = "no layer has collapsed"
    if collapsed := view.collapsed_layers:
        verdict = f"COLLAPSED to about one expert: layer{'s' * (len(collapsed) > 1)} {', '.join(map(str, collapsed))}"
    axes.set_title(f"router probability, step {step:,}\n{verdict}", fontsize=10)
    return figure


def entropy_lines(history: Sequence[tuple[int, Sequence[float]]], layers: Sequence[int], num_experts: int) -> Figure:
    """Plot router entropy by layer over training; `history` holds a step and L entropies in nats per validation.

    The routers of `layers` (L) choose among `num_experts`.
    """
    figure = Figure(figsize=(7, 4), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    steps = [step for step, _ in history]
    num_layers = len(layers)
    colors = mpl.colormaps["plasma"]
    for place, layer in enumerate(layers):
        values = [entropies[place] for _, entropies in history]
        color = colors(0.85 * place / max(1, num_layers - 1))
        axes.plot(steps, values, marker="o", markersize=3, color=color, label=f"layer {layer}")
    for value, meaning in ((math.log(num_experts), f"uniform: ln {num_experts}"), (0.0, "one expert: 0")):
        axes.axhline(value, color="gray", linestyle="--", linewidth=1)
        axes.annotate(meaning, (0.01, value), xycoords=("axes fraction", "data"), va="bottom", fontsize=8, color="gray")
    axes.set(xlabel="step", ylabel="router entropy (nats)", title="router entropy by layer")
    axes.set_ylim(-0.08 * math.log(num_experts), 1.15 * math.log(num_experts))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + num_layers // 16)
    return figure


def expert_tokens(view: RoutingView, tokenizer: Tokenizer, step: int) -> Figure:
    """List the tokens that each expert contributes most to, by mean norm of g_j * v_j, for some layers."""
    num_layers, num_experts = _contributing(view)
    steps = SHOWN_LAYERS - 1  # between layers, from the first to the last
    places = sorted({round(index * (num_layers - 1) / steps) for index in range(SHOWN_LAYERS)})
    experts = range(min(num_experts, SHOWN_EXPERTS))
    height = 0.4 + len(places) * (0.35 + 0.17 * SHOWN_TOKENS)
    figure = Figure(figsize=(1 + 2.1 * len(experts), height), dpi=DPI, layout="constrained")
    for row, place in enumerate(places):
        for expert in experts:
            axes = figure.add_subplot(len(places), len(experts), row * len(experts) + expert + 1)
            axes.set_axis_off()
            axes.set_title(f"layer {view.layers[place]}, expert {expert}", fontsize=9, loc="left")
            top = view.top_tokens(place, expert, SHOWN_TOKENS)
            lines = [f"{norm:6.2f} {_visible(tokenizer, token_id)}" for token_id, norm in top]
            text = axes.text(0, 1, "\n".join(lines), va="top", family="monospace", fontsize=9)
            text.set_parse_math(False)
    figure.suptitle(f"tokens that each expert contributes most to (mean norm of g·v), step {step:,}", fontsize=10)
    return figure


def expert_token_rows(view: RoutingView, tokenizer: Tokenizer, count: int = 10) -> list[list[str | int | float]]:
    """Return rows of layer, expert, rank, token and mean norm of g_j * v_j, for every layer and expert."""
    num_layers, num_experts = _contributing(view)
    return [
        [view.layers[place], expert, rank, _visible(tokenizer, token_id), norm]
        for place in range(num_layers)
        for expert in range(num_experts)
        for rank, (token_id, norm) in enumerate(view.top_tokens(place, expert, count), start=1)
    ]


def _contributing(view: RoutingView) -> tuple[int, int]:
    """Return the numbers of layers and of experts that add something: not the null expert."""
    num_layers, num_experts = (view.probabilities if view.contributions is None else view.contributions[0]).shape
    return num_layers, num_experts


def _label_cells(axes: Any, view: RoutingView) -> None:
    for layer, row in enumerate(view.probabilities.tolist()):
        for expert, value in enumerate(row):
            color = "black" if value > 0.6 else "white"
            axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)


def _visible(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token's text with visible white space, in characters that every font has."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    visible = text.encode("unicode_escape").decode().replace(" ", "·")
    return visible if len(visible) <= _TOKEN_WIDTH else visible[: _TOKEN_WIDTH - 1] + "…"
