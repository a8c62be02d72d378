"""The modules lie beside this folder, not in a package. Corpora are written once per test run and not changed."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

import magtkd  # noqa: E402
from extras import demo  # noqa: E402
from extras.tiny import save_tiny  # noqa: E402


@pytest.fixture(scope="session")
def iemocap(tmp_path_factory):
    """A small corpus in IEMOCAP's layout, with every oddity that extras/demo.py can plant."""
    root = tmp_path_factory.mktemp("corpora") / "iemocap"
    demo.write_iemocap(root, seed=1, conversations=3, utterances=(8, 10), flaws=True)
    return root


@pytest.fixture(scope="session")
def meld(tmp_path_factory):
    """A small corpus in MELD's layout, with every oddity that extras/demo.py can plant."""
    root = tmp_path_factory.mktemp("corpora") / "meld"
    demo.write_meld(root, seed=1, conversations=(6, 2, 3), utterances=(4, 6), flaws=True)
    return root


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a corpus that a test may spoil."""
    return lambda root: Path(shutil.copytree(root, tmp_path / root.name))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Checkpoints with random weights, by modality."""
    return save_tiny(tmp_path_factory.mktemp("tiny"), ["I am so happy today", "this is a terrible day", "well, yes"])


@pytest.fixture
def refused(capsys):
    """Runs the command line, which must refuse: returns its line."""

    def run(*options):
        try:
            code = magtkd.main([str(x) for x in options])
        except SystemExit as e:
            code = e.code
        error = capsys.readouterr().err
        assert code == 2 and "Traceback" not in error, error
        line = error.strip().splitlines()[-1]
        assert line.startswith("magtkd"), error
        return line

    return run
