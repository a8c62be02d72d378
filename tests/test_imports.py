"""Imports go down only; losses.py and fusion.py need torch only, and magtkd.py does not need extras/."""

import ast
import graphlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent
FLOORS = [  # a module imports modules of lower floors; of the commands in the last floor, each other's too
    ["losses", "fusion", "data", "extras.__init__"],
    ["encoders", "extras.report", "extras.demo", "extras.variants"],
    ["extras.check"],
    ["magtkd"],
    ["extras.experiments", "extras.predict", "extras.pickles", "extras.tour", "bench"],
]
FILES = [path for pattern in ("*.py", "extras/*.py", "bench/*.py") for path in PROJECT.glob(pattern)]
MODULES = {".".join(path.relative_to(PROJECT).with_suffix("").parts): path for path in FILES}


def imports(module, inside_functions=True):
    """Full names of what a module imports: "data.InputError" for `from data import InputError`."""
    todo, found = [ast.parse(MODULES[module].read_text(encoding="utf-8"))], set()
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {f"{getattr(node, 'module', '')}.{alias.name}".lstrip(".") for alias in node.names}
        if inside_functions or not isinstance(node, ast.FunctionDef):
            todo += ast.iter_child_nodes(node)
    return found


def floor(module):
    """StopIteration: a new module needs a floor."""
    return next(i for i, names in enumerate(FLOORS) if {module, module.split(".")[0]} & set(names))


def project_imports(module):
    names = {f"{name}." for name in imports(module)}
    return {m for m in MODULES.keys() - {module} if any(name.startswith(f"{m}.") for name in names)}


def test_imports_go_down():
    pairs = [(m, n) for m in MODULES for n in project_imports(m)]
    assert not [f"{m} -> {n}" for m, n in pairs if floor(n) >= floor(m) and floor(m) != len(FLOORS) - 1]
    graphlib.TopologicalSorter({m: project_imports(m) for m in MODULES}).prepare()  # raises for a circle
    for module in ("losses", "fusion"):
        assert {name.split(".")[0] for name in imports(module)} - sys.stdlib_module_names == {"torch"}
    assert not [name for name in imports("magtkd", inside_functions=False) if name.startswith("extras")]


def test_magtkd_without_extras(tmp_path):
    for name in ("losses", "fusion", "data", "encoders", "magtkd"):
        shutil.copy(MODULES[name], tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-c", "import magtkd"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
