"""`python -m src.benchmarks.routing`: record which experts a trained MoE chooses, token after token, for `decode`.

Random weights route almost evenly and trained routers do not, so what offloaded experts cost has to be measured with
choices of a trained model. A trace holds those of consecutive held-out tokens, layer by layer.

B sequences, T tokens, N recorded tokens, L layers, E experts, K experts per token.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from src.benchmarks.common import COUNT
from src.cli import find_run, output_file, parser, run_verb
from src.config import load_run_config
from src.data.packed_corpus import prepare_corpus
from src.data.tokenizer import load_run_rule
from src.data.windows import held_out_windows
from src.errors import UserError
from src.inference import load_model
from src.model import Transformer
from src.model.router import Router, Routing, router_probs
from src.system.files import atomic_path

TRACE = Path(__file__).with_name("routing.npz")
"""The trace that is kept with the code."""
HOW = "python -m src.benchmarks.routing --run RUN"


@dataclass(frozen=True)
class RoutingTrace:
    """The choices of a trained MoE."""

    experts: Tensor
    """(N, L, K) int64."""
    num_experts: int
    about: Mapping[str, Any]
    """What was recorded: model, training and text."""

    @property
    def new_experts(self) -> float:
        """Mean of a token's experts in a layer that the token before did not choose."""
        now, before = self.experts[1:], self.experts[:-1]
        return float((now.unsqueeze(-1) != before.unsqueeze(-2)).all(dim=-1).sum(dim=-1).float().mean())

    def save(self, path: Path) -> None:
        """Write it as a compressed NumPy file of a few kilobytes."""
        about = json.dumps({**self.about, "num_experts": self.num_experts})
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, experts=self.experts.to(torch.uint8).numpy(), about=np.array(about))


def load_trace(path: Path = TRACE) -> RoutingTrace:
    """Read a trace; UserError when it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path}: no routing trace; record one with `{HOW} --output {path}`")
    try:
        with np.load(path) as stored:
            experts, about = torch.from_numpy(stored["experts"].astype(np.int64)), json.loads(str(stored["about"]))
        num_experts = int(about.pop("num_experts"))
        if experts.dim() != 3 or not experts.numel() or int(experts.max()) >= num_experts:
            raise ValueError(f"experts of shape {tuple(experts.shape)}, of {num_experts}")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: not a routing trace ({error}); record it again with `{HOW} --output {path}`"
        ) from error
    return RoutingTrace(experts, num_experts, about)


def find_trace(path: Path | None, console: Console) -> RoutingTrace | None:
    """Return the trace in `path`, by default the one that is kept with the code; say so where there is none."""
    if path is None and not TRACE.is_file():
        note = f"no routing trace in {TRACE}: recorded choices are left out; record them with `{HOW}`"
        console.print(note, soft_wrap=True)
        return None
    return load_trace(path or TRACE)


class Replay:
    """Where in a trace each sequence of a batch is: they start far apart, and begin again at its end."""

    def __init__(self, trace: RoutingTrace, batch: int) -> None:
        self._experts, self._starts = trace.experts, torch.arange(batch) * (len(trace.experts) // batch)
        self.position = 0
        """Of the first token of the next forward pass, from the start of its sequence."""

    def chosen(self, layer: int, num_tokens: int) -> Tensor:
        """Return the experts (B, T, K) of a layer for the next tokens; layers of a deeper model repeat the trace's."""
        positions = self._starts.unsqueeze(1) + self.position + torch.arange(num_tokens)  # (B, T)
        return self._experts[positions % len(self._experts), layer % self._experts.shape[1]]


class RecordedRouter(nn.Module):
    """A router whose choices come from a trace; it computes its own logits, and weighs the choices by them."""

    def __init__(self, router: Router, layer: int) -> None:
        super().__init__()
        self.router, self._layer = router, layer
        self.replay: Replay | None = None

    def forward(self, hidden_states: Tensor) -> Routing:
        logits = self.router(hidden_states).logits  # (B, T, E)
        assert self.replay is not None
        experts = self.replay.chosen(self._layer, hidden_states.shape[1])
        return Routing(logits, router_probs(logits.gather(-1, experts)), experts)


@torch.inference_mode()
def record(model: Transformer, token_ids: Tensor) -> Tensor:
    """Return the experts (N, L, K) that `model` chooses at `token_ids` (B, T), read sequence by sequence, N = B * T."""
    layers: list[list[Tensor]] = [[] for _ in model.blocks]

    def keep(layer: int, _module: nn.Module, _inputs: object, routing: Routing) -> None:
        assert routing.experts is not None
        layers[layer].append(routing.experts.flatten(0, 1).cpu())

    hooks = [
        block.get_submodule("router").register_forward_hook(partial(keep, layer))
        for layer, block in enumerate(model.blocks)
    ]
    for window in token_ids.split(1):
        model.hidden_states(window)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(parts) for parts in layers], dim=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read a run, record, and write the trace."""
    options = parser("benchmarks.routing", __doc__ or "", f"{HOW} --tokens 2000 --output routing.npz")
    options.add_argument("--run", type=Path, required=True, help="run directory of an MoE that chooses experts")
    options.add_argument("--tokens", type=COUNT, default=2000, help="held-out tokens to record (default: 2000)")
    options.add_argument("--output", type=output_file, default=TRACE, metavar="FILE.npz", help=f"default: {TRACE.name}")
    given = options.parse_args(arguments)
    run = find_run(given.run)
    config = load_run_config(run)
    if config.model.architecture != "moe" or config.model.top_k is None or config.model.num_experts > 256:
        raise UserError(f"--run {given.run}: is no MoE that chooses among at most 256 experts; name one that does")
    rule = load_run_rule(run.tokenizer_path, run.recorded_tokenizers(), run.text_rule())
    tokens, length = prepare_corpus(config.data, rule).tokens("validation"), config.data.sequence_length
    windows = held_out_windows(tokens, length, len(tokens))[: -(-given.tokens // length), :-1]  # (B, T), neighbors
    if windows.numel() < given.tokens:
        raise UserError(f"--tokens {given.tokens}: the held-out text of {given.run} has {windows.numel()}; take fewer")
    with load_model(run.path) as model:
        experts = record(model, windows)[: given.tokens]
    about = {
        "model": config.name,
        "steps": config.trainer.max_steps,
        "seed": config.seed,
        "window": length,
        "corpus": run.recorded_corpus("fingerprint"),
    }
    trace = RoutingTrace(experts, config.model.num_experts, about)
    trace.save(given.output)
    shares = experts.flatten(0, 1).flatten().bincount(minlength=trace.num_experts) / experts.numel()
    console = Console()
    size, layers = given.output.stat().st_size, experts.shape[1]
    console.print(f"{given.output}: {len(experts):,} tokens, {layers} layers, {size:,} bytes", soft_wrap=True)
    console.print(f"experts of a token and layer that the token before did not choose: {trace.new_experts:.2f}")
    console.print(f"shares of experts: {' '.join(f'{share:.3f}' for share in shares.tolist())}")


if __name__ == "__main__":
    run_verb(main)
