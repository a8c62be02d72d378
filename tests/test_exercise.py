"""The changes of docs/course.md apply to today's files, and those of fusion.py run."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parent.parent
DIFFS = re.findall(r"In `(\w+\.py)`.*?```diff\n(.*?)```", (PROJECT / "docs/course.md").read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_the_change_applies(number, monkeypatch):
    name, diff = DIFFS[number - 1]
    old, new = ("".join(x[1:] for x in diff.splitlines(keepends=True) if x[0] in f"{sign} ") for sign in "-+")
    source, module = (PROJECT / name).read_text("utf-8"), types.ModuleType("changed")
    assert source.count(old) == 1
    code = compile(source.replace(old, new), name, "exec")
    if name == "fusion.py":
        monkeypatch.setitem(sys.modules, "changed", module)  # dataclasses look there
        exec(code, module.__dict__)
        model = module.MAGT(module.FusionConfig({"text": 16}, num_classes=5, num_speakers=1, width=16, causal=True))
        given = {"text": torch.randn(6, 16)}, torch.ones(6, dtype=torch.int64), [3, 3], {"text": torch.arange(6) > 3}
        assert model(*given).logits["text"].isfinite().all()
