"""How the code is cut: names that mean one thing, and functions and modules that can be read in one go."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(path for package in ("src", "callbacks") for path in (ROOT / package).rglob("*.py"))
FUNCTION_LINES, MODULE_LINES = 60, 500


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def nodes(trees: dict[str, ast.Module]) -> Iterator[tuple[str, ast.AST]]:
    for where, tree in trees.items():
        for node in ast.walk(tree):
            yield where, node


def test_no_two_classes_have_one_name(trees: dict[str, ast.Module]) -> None:
    places: defaultdict[str, list[str]] = defaultdict(list)
    for where, node in nodes(trees):
        if isinstance(node, ast.ClassDef):
            places[node.name].append(where)
    assert len(places) > 100
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_functions_and_modules_are_short(trees: dict[str, ast.Module]) -> None:
    long_functions = {
        f"{where}: {node.name}": lines
        for where, node in nodes(trees)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES
    }
    long_modules = {
        str(path.relative_to(ROOT)): lines
        for path in MODULES
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MODULE_LINES
    }
    assert (long_functions, long_modules) == ({}, {})
