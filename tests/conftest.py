"""Corpora are written once per test run and never changed. Imports are inside: a test needs only what it tests."""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # the modules are there, not in a package

for name in ("losses", "fusion"):  # docs/exercise.md: LOSSES or FUSION names a file that takes the module's place
    if path := os.environ.get(name.upper()):
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


@pytest.fixture(scope="session")
def iemocap(tmp_path_factory):
    from corpora import make_iemocap

    return make_iemocap(tmp_path_factory.mktemp("corpora") / "iemocap")


@pytest.fixture(scope="session")
def meld(tmp_path_factory):
    from corpora import make_meld

    return make_meld(tmp_path_factory.mktemp("corpora") / "meld")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    from extras.demo import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"), ["I am so happy today", "this is a terrible day", "well, yes"])


@pytest.fixture
def refused(capsys):
    """Runs the command line, which must refuse: returns its line."""

    def run(*options):
        import magtkd

        with contextlib.suppress(SystemExit):  # argparse's own errors
            assert magtkd.main([str(x) for x in options]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("magtkd")
        return line

    return run
