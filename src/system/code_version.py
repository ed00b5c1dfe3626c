"""Which code runs: the package's version and, in a checkout, the commit."""

import importlib.metadata
import subprocess
from pathlib import Path


def code_version() -> dict[str, str | bool | None]:
    """Return version, commit and whether files differ from it; commit is None outside a checkout."""
    commit = _git("rev-parse", "HEAD")
    return {
        "version": importlib.metadata.version("mole"),
        "commit": commit,
        "modified": None if commit is None else bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():  # a repository around an installed package is another one
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
