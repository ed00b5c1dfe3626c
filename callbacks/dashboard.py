"""Draws the routing and samples text with each validation, into `figures/` and trackers."""

from pathlib import Path
from typing import Any

import lightning
from matplotlib.figure import Figure

from callbacks.failures import RunCallback
from src.evaluation.config import EvaluationConfig
from src.evaluation.figures import entropy_lines, expert_token_rows, expert_tokens, probability_heat_map
from src.evaluation.held_out import HeldOut
from src.evaluation.perplexity import Share
from src.evaluation.report import sample_text
from src.evaluation.routing_view import RoutingView, view_routing
from src.evaluation.suite import evaluating
from src.model.sharding import is_sharded
from src.system.files import atomic_path
from src.training.lightning_module import LanguageModel
from src.training.tracking import log_figures, log_table, logged_step

VIEWED_TOKENS = 8192
"""Tokens of held-out text that the routing is measured on."""


class DashboardCallback(lightning.Callback):
    """Draws router probability, router entropy and tokens by expert, and keeps a table of samples.

    Every rank measures its share of the text; rank 0 draws.
    """

    def __init__(self, run: RunCallback, config: EvaluationConfig, text: HeldOut) -> None:
        """Measure the routing on `text`."""
        self.run, self.config, self.text = run, config, text
        windows = text.windows[:, :-1]
        self.windows = windows[: max(1, VIEWED_TOKENS // windows.shape[1])]
        self.entropies: list[tuple[int, list[float]]] = []
        self.samples: list[list[str | int]] = []
        self._shown_step = -1

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw with the weights that validation sees."""
        if not trainer.sanity_checking:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw the final model, unless its validation just did."""
        if self._shown_step != trainer.global_step:
            self._show(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what later figures and tables repeat."""
        return {"entropies": self.entropies, "samples": self.samples, "shown_step": self._shown_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.entropies, self.samples = state_dict["entropies"], state_dict["samples"]
        self._shown_step = state_dict.get("shown_step", -1)

    def _show(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        model, share = pl_module.model, Share(trainer.global_rank, trainer.world_size)
        self._shown_step = trainer.global_step
        sample: str | None = None
        with evaluating(model):
            size, mask = self.config.batch_size, self.text.mask
            view = view_routing(model, self.windows, batch_size=size, share=share, mask=mask)
            if trainer.is_global_zero or is_sharded(model):
                sample = sample_text(model, self.text.rule, self.config)
        if trainer.is_global_zero:
            self._keep(trainer.global_step, view, sample)
            self._log(trainer, view)

    def _keep(self, step: int, view: RoutingView | None, sample: str | None) -> None:
        """Remember this step, in place of what an earlier run of it measured."""
        if view is not None:
            self.entropies = [kept for kept in self.entropies if kept[0] < step] + [(step, view.entropy.tolist())]
        if sample is not None:
            self.samples = [kept for kept in self.samples if int(kept[0]) < step]
            self.samples.append([step, self.config.sample_prompt, sample])

    def _log(self, trainer: lightning.Trainer, view: RoutingView | None) -> None:
        step, logged, loggers = trainer.global_step, logged_step(trainer), trainer.loggers
        tokenizer = self.text.tokenizer
        if self.samples:
            log_table(loggers, "samples", ["step", "prompt", "text"], self.samples, logged)
        if view is None:
            return
        figures = {
            "router_probability": probability_heat_map(view, step),
            "router_entropy": entropy_lines(self.entropies, view.layers, view.probabilities.shape[1]),
        }
        if view.contributions is not None:
            figures["expert_tokens"] = expert_tokens(view, tokenizer, step)
            columns = ["layer", "expert", "rank", "token", "mean norm of g*v"]
            log_table(loggers, "expert_tokens", columns, expert_token_rows(view, tokenizer), logged)
        log_figures(loggers, {name: self._save(name, figure) for name, figure in figures.items()}, logged)
        for logger in loggers:
            logger.log_metrics({f"val/{key}": value for key, value in view.metrics().items()}, step=logged)

    def _save(self, name: str, figure: Figure) -> Path:
        path = self.run.directory.path / "figures" / f"{name}.png"
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")
        return path
