"""losses.py and fusion.py work where nothing but torch and a copy of them is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
# What torch and Python bring along is allowed; the rest of the project and its other packages are not.
GUARD = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused}:
            raise ImportError(f"{{name}} is not here")
sys.meta_path.insert(0, Refuse())
sys.argv = ["alone.py", {name!r}]
import runpy
runpy.run_path("alone.py", run_name="__main__")
"""
OTHERS = {"losses": "fusion", "fusion": "losses"}
REFUSED = {"transformers", "safetensors", "sklearn", "matplotlib", "av", "torchaudio", "torchvision", "tqdm", "data"}
REFUSED |= {"magtkd", "encoders", "extras", "bench"}


def run_alone(folder, name, refused):
    (folder / "run.py").write_text(GUARD.format(refused=refused, name=name))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "run.py"], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", OTHERS)
def test_a_copied_file_needs_torch_alone(name, tmp_path):
    for file in (PROJECT / f"{name}.py", PROJECT / "tests" / "alone.py"):
        shutil.copy(file, tmp_path)
    done = run_alone(tmp_path, name, REFUSED | {OTHERS[name]})
    assert done.returncode == 0 and done.stdout.startswith(f"{name}: ok"), done.stderr


def test_the_guard_refuses(tmp_path):
    shutil.copy(PROJECT / "tests" / "alone.py", tmp_path)
    shutil.copy(PROJECT / "losses.py", tmp_path)
    (tmp_path / "losses.py").write_text("import safetensors\n" + (tmp_path / "losses.py").read_text())
    done = run_alone(tmp_path, "losses", REFUSED)
    assert done.returncode and "safetensors is not here" in done.stderr
