"""Imports go one way, hidden ones too: kernels <- fastdiff <- train <- benchmarks, tests; only kernels knows Triton."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BELOW = {"kernels": set(), "fastdiff": {"kernels"}, "train": {"kernels", "fastdiff"}}
FILES = [(package, path) for package in BELOW for path in sorted((ROOT / package).rglob("*.py"))]
DYNAMIC = {"import_module", "run_module", "run_path", "__import__", "spec_from_file_location"}
TABLE = "train/commands.py"  # of the commands, which it runs by their names; it may name all below it, and its own
HIDDEN = {TABLE: {"run_module"}, "fastdiff/networks.py": {"spec_from_file_location"}}  # the user's own file
OURS = re.compile(r"(kernels|fastdiff|train|benchmarks|tests)(\.\w+)*")


def imported(tree: ast.AST):
    """The modules that any statement imports, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "attr", getattr(node.func, "id", None))


@pytest.mark.parametrize(("package", "path"), FILES, ids=lambda value: getattr(value, "stem", value))
def test_nothing_imports_upward(package, path):
    tree, name = ast.parse(path.read_text()), str(path.relative_to(ROOT))
    allowed = BELOW[package] | {package}
    for module in imported(tree):
        top = module.partition(".")[0]
        assert top not in {*BELOW, "benchmarks", "tests"} - allowed, f"{name} imports {module}"
        assert top != "triton" or package == "kernels", f"{name} imports triton"
    hidden = DYNAMIC & {*calls(tree)}
    assert hidden == HIDDEN.get(name, set()), f"{name} imports by {hidden}, which no one sees"


def test_the_table_of_commands_names_modules_that_exist():
    tree = ast.parse((ROOT / TABLE).read_text())
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    modules = [text for text in strings if "." in text and OURS.fullmatch(text)]
    assert len(modules) >= 13
    for module in modules:
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def test_the_check_sees_what_is_hidden():
    tree = ast.parse("def f():\n    from train import loop\n    importlib.import_module('train.rounds')")
    assert [*imported(tree)] == ["train"] and "import_module" in {*calls(tree)}
