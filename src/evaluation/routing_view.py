"""What the routers do with text: shares of experts, their top tokens, and the mixture where one token occurs.

Knows nothing of figures and printing. N windows, B batch, T tokens, E experts, C choices of a router (E, and one more
with a null expert), L layers with experts, U distinct token ids.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from src.evaluation.perplexity import Mask, Share, no_mask
from src.model import Transformer
from src.model.router import router_entropy, router_probs
from src.system.console import Advance, no_advance

COLLAPSED = 1.5
"""A layer that spreads probability over fewer effective experts than this has collapsed."""
MIN_OCCURRENCES = 3
"""A token seen less often says little of an expert."""


@dataclass(frozen=True, kw_only=True)
class RoutingView:
    """The routers of a model over some text."""

    layers: tuple[int, ...]
    """(L,) which layers of the model these are."""
    probabilities: Tensor
    """(L, C) mean router probability."""
    entropy: Tensor
    """(L,) mean entropy of the router's choice at a position, in nats: ln C when undecided, 0 when certain."""
    token_ids: Tensor
    """(U,) ids that occurred."""
    counts: Tensor
    """(U,) how often."""
    contributions: Tensor | None
    """(U, L, E) mean norm of g_j * v_j over the id's positions; None where experts read hidden states."""

    @property
    def effective_experts(self) -> Tensor:
        """(L,) exponential of the entropy of the mean probability: C when all take part, 1 when one choice is left."""
        return torch.special.entr(self.probabilities).sum(dim=-1).exp()

    @property
    def collapsed_layers(self) -> list[int]:
        collapsed = (self.effective_experts < min(COLLAPSED, self.probabilities.shape[1])).tolist()
        return [layer for layer, has_collapsed in zip(self.layers, collapsed, strict=True) if has_collapsed]

    def metrics(self) -> dict[str, float]:
        return {
            "router/effective_experts": self.effective_experts.mean().item(),
            "router/effective_experts_min": self.effective_experts.min().item(),
            "router/collapsed_layers": float(len(self.collapsed_layers)),
        }

    def top_tokens(self, place: int, expert: int, count: int) -> list[tuple[int, float]]:
        """Return the ids that an expert of `layers[place]` contributes most to, with the mean norm of what it adds."""
        if self.contributions is None:
            return []
        often = self.counts >= min(MIN_OCCURRENCES, int(self.counts.max()))
        norms = self.contributions[:, place, expert].masked_fill(~often, -math.inf)
        best = norms.topk(min(count, int(often.sum())))
        return [(int(self.token_ids[index]), value) for value, index in zip(*map(Tensor.tolist, best), strict=True)]


@torch.no_grad()
def view_routing(
    model: Transformer, windows: Tensor, *, batch_size: int, share: Share, mask: Mask = no_mask
) -> RoutingView | None:
    """Look at the routers over `windows` (N, T) int64; None in a dense model. Every rank of `share` must call it."""
    if not model.config.num_experts:
        return None
    parts = share.map(lambda batch: _observe(model, batch, mask), windows.split(batch_size))
    positions = sum(part.positions for part in parts)
    ids, inverse = torch.cat([part.token_ids for part in parts]).unique(return_inverse=True)  # (U,)
    counts = torch.zeros(len(ids), dtype=torch.int64).index_add(0, inverse, torch.cat([part.counts for part in parts]))
    norms = [part.norms for part in parts if part.norms is not None]
    contributions = None
    if norms:
        sums = torch.cat(norms)
        totals = sums.new_zeros(len(ids), *sums.shape[1:]).index_add(0, inverse, sums)  # (U, L, E)
        contributions = totals / counts[:, None, None]
    return RoutingView(
        layers=model.config.mixture_layers,
        probabilities=torch.stack([part.probabilities for part in parts]).sum(dim=0) / positions,
        entropy=torch.stack([part.entropy for part in parts]).sum(dim=0) / positions,
        token_ids=ids,
        counts=counts,
        contributions=contributions,
    )


@dataclass(frozen=True, kw_only=True)
class _Observation:
    """Sums over the positions of one batch."""

    positions: int
    probabilities: Tensor
    entropy: Tensor
    token_ids: Tensor
    counts: Tensor
    norms: Tensor | None


def _observe(model: Transformer, batch: Tensor, mask: Mask) -> _Observation:
    """Run `batch` (B, T) and sum what the routers did."""
    token_ids = batch.to(model.embedding.weight.device)
    ids, inverse, counts = token_ids.unique(return_inverse=True, return_counts=True)
    logits = model.trunk(token_ids, attention_mask=mask(token_ids)).router_logits
    norms, rows = None, model.expert_rows(token_ids)  # after `trunk`, which leaves a sharded model's embedding whole
    if rows is not None:
        layers = enumerate(_gates(layer_logits, model.config.top_k) for layer_logits in logits)
        sums = [_sums(gate, rows.layer_rows(layer), rows.inverse, inverse) for layer, gate in layers]  # L of (U, E)
        norms = torch.stack(sums, dim=1).cpu()
    probabilities = torch.stack([router_probs(layer_logits).flatten(0, 1).sum(dim=0) for layer_logits in logits])
    entropy = torch.stack([router_entropy(layer_logits) * token_ids.numel() for layer_logits in logits])
    return _Observation(
        positions=token_ids.numel(),
        probabilities=probabilities.cpu(),
        entropy=entropy.cpu(),
        token_ids=ids.cpu(),
        counts=counts.cpu(),
        norms=norms,
    )


def _gates(logits: Tensor, top_k: int | None) -> Tensor:
    """Return mixture weights (B, T, C): zero for experts that are not chosen."""
    if top_k is None:
        return router_probs(logits)
    chosen, experts = logits.topk(top_k, dim=-1)  # (B, T, K)
    weights = router_probs(chosen)
    return torch.zeros_like(logits, dtype=weights.dtype).scatter(-1, experts, weights)


def _sums(gate: Tensor, rows: Tensor, row_of: Tensor, inverse: Tensor) -> Tensor:
    """Sum |g_j v_j| over the positions of each distinct id: (U, E).

    `row_of` (B, T) says which of `rows` each position mixes, `inverse` (B, T) which distinct id it holds: a model may
    compute an id more than once.
    """
    norms = rows.to(torch.promote_types(rows.dtype, torch.float32)).norm(dim=-1)  # (rows, E)
    of_experts = gate[..., : norms.shape[1]]  # a null expert adds nothing
    contributions = (of_experts * norms[row_of]).flatten(0, 1).to(norms.dtype)  # (B*T, E)
    num_ids = int(inverse.max()) + 1
    return norms.new_zeros(num_ids, norms.shape[1]).index_add(0, inverse.flatten(), contributions)


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """Weights of the mixture at a token's occurrences."""

    occurrences: int
    shares: Tensor | None
    """(L, C): mean weight of each choice, rows sum to 1; None where the token does not occur."""


def windows_with(windows: Tensor, token_id: int, limit: int) -> Tensor:
    """Return the inputs (B, T) of at most `limit` windows (N, T+1) that hold the token."""
    inputs = windows[:, :-1]
    return inputs[(inputs == token_id).any(dim=1)][:limit]


@torch.no_grad()
def measure_token_weights(
    model: Transformer, inputs: Tensor, token_id: int, *, progress: Advance = no_advance, mask: Mask = no_mask
) -> TokenWeights:
    """Run inputs (B, T) int64, one window at a time, and average the mixture weights where the token occurs."""
    sums, occurrences = torch.zeros(len(model.config.mixture_layers), model.config.router_choices), 0
    for window in inputs.unsqueeze(1):  # (1, T)
        here = (window[0] == token_id).nonzero().flatten()  # positions
        logits = model.trunk(window, attention_mask=mask(window)).router_logits
        gates = [_gates(layer_logits, model.config.top_k) for layer_logits in logits]
        sums += torch.stack([gate[0].cpu().index_select(0, here).float().sum(dim=0) for gate in gates])  # (L, C)
        occurrences += len(here)
        progress(1)
    return TokenWeights(occurrences=occurrences, shares=sums / occurrences if occurrences else None)
