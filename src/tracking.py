"""Where metrics go: a CSV in the run directory, always, and Weights & Biases."""

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
    import wandb  # seconds to import, and not needed when disabled

    return wandb.login(prompt=False)


def _wandb_logger(config: RunConfig, run: RunDirectory, mode: str) -> WandbLogger:
    import wandb

    return WandbLogger(
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
