"""Where metrics go: a CSV in the run directory, always, and Weights & Biases."""

import netrc
import os
from collections.abc import Iterable
from urllib.parse import urlparse

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
    """Look where W&B looks, without importing it (seconds) or logging in."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_logger(config: RunConfig, run: RunDirectory, mode: str) -> WandbLogger:
    import wandb

    logger = WandbLogger(
        name=run.path.name,
        save_dir=run.path,
        project=config.wandb.project,
        entity=config.wandb.entity,
        tags=list(config.wandb.tags),
        offline=mode == "offline",
        config=config.to_dict(),
        # no console output, no host name, no command line, no paths: metrics and config are all that is recorded
        settings=wandb.Settings(console="off", silent=True, x_disable_meta=True, x_disable_stats=True),
    )
    logger._wandb_init.pop("anonymous")  # Lightning passes it always, and W&B warns that it means nothing any more
    return logger


def close_loggers(loggers: Iterable[Logger], *, failed: bool) -> None:
    """Finish the W&B run, so that its record is whole when `train` returns."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            logger.experiment.finish(exit_code=int(failed))
