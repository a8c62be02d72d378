"""Sweep and presets: every cell has its options, and a second start resumes."""

import dataclasses
import json
import shutil

import pytest
from test_report import example
from test_run import spy

import magtkd
from data import scores, write_features
from extras import experiments
from magtkd import CONFIGS, open_run

CONFIG = dataclasses.replace(CONFIGS["demo"], width=8, stage2_epochs=2)


@pytest.fixture
def trained(monkeypatch):
    names: list[str] = []
    spy(monkeypatch, magtkd, "train", lambda *args: names.append(args[5].name))
    return names


@pytest.fixture
def run(tmp_path):
    """What a finished run has, as far as the experiments need it."""
    options = dataclasses.asdict(CONFIG) | {"corpus": "demo", "features": False}
    open_run(tmp_path / "run", {k: x for k, x in options.items() if k not in magtkd.FREE}, notes=options)
    write_features(tmp_path / "run/features.safetensors", dataclasses.replace(example(), made_from={"text": "1"}))
    return tmp_path / "run"


def test_sweep(run, trained):
    options, config = (
        ["sweep", "--run", str(run), "--grid", "0.5", "0", "--seeds", "2"],
        (run / "config.json").read_bytes(),
    )
    assert experiments.main(options) == 0
    text, count = (run / "sweep.md").read_text(), 0
    for a in (0.0, 0.5):
        line = f"| **{a:g}** |"
        for b in (0.0, 0.5):
            names = [f"alpha{a}-beta{b}-seed{s}".replace(".", "_") for s in (0, 1)]
            results = [json.loads((run / f"sweep/{name}.json").read_text()) for name in names]
            assert all(r["made_from"]["weights of the loss"][:2] == [a, b] for r in results)
            f1 = [scores(r["labels"], r["predictions"])["weighted_f1"] for r in results]
            line += f" {sum(f1) / 2:.2f} ± {abs(f1[0] - f1[1]) / 2**0.5:.2f} |"
            count += sum(name in trained for name in names)
        assert line in text
    assert count == len(trained) == 8 and "synthetic" in text and (run / "figures/sweep.png").is_file()
    trained.clear()
    (run / "sweep/alpha0_5-beta0_0-seed1.json").unlink()
    assert experiments.main(options) == 0 and trained == ["alpha0_5-beta0_0-seed1"]
    assert (run / "sweep.md").read_text() == text and (run / "config.json").read_bytes() == config


def test_presets_on_a_feature_file(tmp_path, trained, monkeypatch):
    monkeypatch.setitem(CONFIGS, "meld", CONFIG)
    write_features(tmp_path / "f.safetensors", example())
    options = f"presets --features {tmp_path}/f.safetensors --out {tmp_path}/x --seeds 2 --corpus meld".split()
    assert experiments.main(options) == 0
    rows = [x.split(" | ") for x in (tmp_path / "x/presets.md").read_text().splitlines() if x.startswith("| ")][1:]
    names = list(experiments.differences("meld"))
    assert len(trained) == 2 * len(names) and rows[1][0] == "| the paper"
    assert len(rows) == 1 + len(names) and rows[1][3] == "" and all(" to " in row[4] for row in rows[2:])
    results = [json.loads((tmp_path / f"x/presets/{name}-seed0.json").read_text()) for name in names]
    assert len({r["history"][-1]["dev"]["loss"] for r in results}) == len(names)  # each changes something
    assert experiments.main([*options, "--fresh"]) == 0 and len(trained) == 4 * len(names)


@pytest.mark.parametrize(
    "options, words",
    [
        ("sweep --run nowhere", "nowhere is no run's folder"),
        ("sweep --features nowhere", "nowhere"),
        ("presets --run {run}", "no features.safetensors"),
        ("presets --run {damaged}", magtkd.MARKER),
    ],
)
def test_what_cannot_be_done(options, words, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / magtkd.MARKER).write_text('{"program": "magtkd"}')
    (run / "features.safetensors").unlink()
    assert experiments.main(options.format(run=run, damaged=damaged).split()) == 2
    assert words in capsys.readouterr().err
