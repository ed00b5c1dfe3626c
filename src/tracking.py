"""Where metrics go: a CSV in the run directory, always, and Weights & Biases."""

import os
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from src.config import RunConfig, WandbConfig
from src.run_directory import RunDirectory


def build_loggers(config: RunConfig, run: RunDirectory) -> list[Logger]:
    """Return the loggers of a run; only `online` sends anything anywhere."""
    loggers: list[Logger] = [CSVLogger(save_dir=run.path, name="", version="")]
    mode = wandb_mode(config.wandb)
    if mode != "disabled":
        loggers.append(_wandb_logger(config, run, mode))
    return loggers


def wandb_mode(config: WandbConfig) -> str:
    """Resolve `auto`: online with an API key, offline without one."""
    return config.mode if config.mode != "auto" else ("online" if _has_api_key() else "offline")


def _has_api_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb  # seconds to import, and not needed when disabled

    return bool(wandb.Api.__module__ and wandb.api.api_key)


def _wandb_logger(config: RunConfig, run: RunDirectory, mode: str) -> WandbLogger:
    import wandb

    settings: dict[str, Any] = {"console": "off", "silent": True, "x_disable_meta": True, "x_disable_stats": True}
    return WandbLogger(
        name=run.path.name,
        save_dir=run.path,
        project=config.wandb.project,
        entity=config.wandb.entity,
        tags=list(config.wandb.tags),
        offline=mode == "offline",
        config=config.to_dict(),
        settings=wandb.Settings(**settings),
    )
