"""python -m bench.speed at toy sizes, from start to end; and the share of padding, worked by hand."""

import ast
import json
from pathlib import Path

import pytest

from bench import speed
from bench.modes import bfloat16_is_fast


def test_toy_run(tmp_path, capsys):
    speed.main(["--toy", "--out", str(tmp_path / "new")])
    result = json.loads((tmp_path / "new/speed.json").read_text())
    assert (tmp_path / "new/speed.png").read_bytes().startswith(b"\x89PNG")
    assert result["toy"] is True  # or it would be taken for a measurement
    one, two = result["stage1"], result["stage2"]
    assert list(one["seconds"]) == ["neither", "decoded once", "taught once", "both"]
    assert all(len(s) == 1 and s[0] > 0 for s in one["seconds"].values())
    assert two["utterances"] == 8 + 18 + 26 + 47

    # The caches keep what they replace, and padded attention has our answers: each way has the same losses.
    for way, loss in one["loss"].items():
        assert loss == pytest.approx(one["loss"]["both"], rel=1e-3), way
    assert two["loss"]["padded, float32"] == pytest.approx(two["loss"]["float32"], rel=1e-4)

    printed = capsys.readouterr().out
    assert (two["seconds"]["bfloat16"] is None) == (not bfloat16_is_fast("cpu"))
    assert ("stage 2, bfloat16: not measured" in printed) == (two["seconds"]["bfloat16"] is None)
    assert "dev W-F1" not in printed  # nobody computes one here


def test_share_of_padding():
    lengths = {"a": 4, "b": 2, "c": 1, "d": 1}
    assert speed.padding_share(lengths, [["a", "b"], ["c", "d"]]) == pytest.approx(2 / 10)
    assert speed.padding_share(lengths, [["a", "b", "c", "d"]]) == pytest.approx(8 / 16)
    assert speed.padding_share(lengths, [[name] for name in lengths]) == 0


def test_epochs_are_those_of_the_training_loop():
    """speed.py has no loop of its own: nothing in it takes a step of an optimizer."""
    tree = list(ast.walk(ast.parse(Path(speed.__file__).read_text())))
    called = {node.attr for node in tree if isinstance(node, ast.Attribute)}
    called |= {node.id for node in tree if isinstance(node, ast.Name)}
    assert "train" in called and not called & {"backward", "step", "zero_grad", "optimizer_step"}
