"""The layers of pyproject.toml, which import-linter holds, name every package and module."""

import tomllib

from tests.conftest import CONFIGS

ROOT = CONFIGS.parent


def test_every_package_and_verb_has_a_layer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    named = [name for layer in layers for name in layer.split(" | ")]
    present = {
        path.stem for path in (ROOT / "src").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert sorted(named) == sorted({f"src.{name}" for name in present - {"__init__"}} | {"callbacks"})
