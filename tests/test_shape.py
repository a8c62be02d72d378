"""The shape of the project: five modules, one loop, and who may import whom."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
FIVE = ("data", "encoders", "fusion", "losses", "magtkd")
FILES = [PROJECT / f"{name}.py" for name in FIVE]


def imports(tree):
    """The first part of every module's name that is imported somewhere in a piece of code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Name) and node.id in ("__import__", "importlib"):
            raise AssertionError(f"line {node.lineno}: an import that cannot be followed")


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_top_level_holds_the_five_modules():
    assert sorted(path.name for path in PROJECT.glob("*.py")) == [path.name for path in FILES]


def test_an_hours_reading():
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert sum(lines.values()) < 1900, lines
    assert max(lines.values()) <= 600, lines


def test_one_training_loop():
    assert sum(path.read_text(encoding="utf-8").count("for epoch in") for path in FILES) == 1


def test_only_the_command_line_imports_extras():
    """Of the five, the body of magtkd.main alone. None imports bench/ or the tests."""
    for path in FILES:
        tree = parse(path)
        assert not set(imports(tree)) & {"bench", "tests"}, path.name
        if path.stem == "magtkd":
            main = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
            assert len(main) == 1 and "extras" in imports(main[0])
            main[0].body = []
        assert "extras" not in imports(tree), f"{path.name} imports extras"


@pytest.mark.parametrize("folder", ["extras", "bench"])
def test_what_lies_around_imports_the_five_and_no_tests(folder):
    for path in sorted((PROJECT / folder).rglob("*.py")):
        found = set(imports(parse(path)))
        assert "tests" not in found, path
        if folder == "extras":
            assert "bench" not in found, path


@pytest.mark.parametrize("module", ["losses", "fusion"])
def test_losses_and_fusion_import_torch_alone(module):
    found = set(imports(parse(PROJECT / f"{module}.py")))
    assert "torch" in found and found - {"torch"} <= sys.stdlib_module_names


def test_the_five_import_each_other_in_one_direction():
    """losses and fusion; data; encoders; magtkd: each imports only what stands before it."""
    before = {"losses": set(), "fusion": set(), "data": set(), "encoders": {"data"}, "magtkd": set(FIVE) - {"magtkd"}}
    for name, allowed in before.items():
        tree = parse(PROJECT / f"{name}.py")
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]  # `if __name__ == "__main__"`
        assert set(imports(tree)) & set(FIVE) <= allowed, name


def run_alone(folder, modules, program):
    """A Python process in `folder`, which holds nothing but copies of `modules`: its stdout."""
    for name in modules:
        shutil.copy(PROJECT / f"{name}.py", folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_five_without_extras(tmp_path):
    program = "import magtkd, data, encoders, fusion, losses, sys; print('extras' in sys.modules, magtkd.__file__)"
    assert run_alone(tmp_path, FIVE, program) == f"False {tmp_path / 'magtkd.py'}"


@pytest.mark.parametrize("module", ["losses", "fusion"])
def test_the_file_needs_torch_alone(module, tmp_path):
    """Copied into an empty folder, it imports nothing that is neither torch's nor Python's."""
    program = (
        f"import sys, torch; before = set(sys.modules); import {module};"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        f"print(new - {{'torch', '{module}'}} - sys.stdlib_module_names)"
    )
    assert run_alone(tmp_path, [module], program) == "set()"
