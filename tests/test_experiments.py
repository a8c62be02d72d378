"""Sweep and presets: every cell has its options, and a second start resumes."""

import dataclasses
import json

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


def test_sweep(tmp_path, trained, capsys):
    run, options = tmp_path / "run", dataclasses.asdict(CONFIG) | {"corpus": "demo", "features": False}
    open_run(run, {k: x for k, x in options.items() if k not in magtkd.FREE}, notes=options)
    start = ["sweep", "--run", str(run), "--grid", "0.5", "0", "--seeds", "2"]
    assert experiments.main(start) == 2 and "no features.safetensors" in capsys.readouterr().err
    write_features(run / "features.safetensors", dataclasses.replace(example(), made_from={"text": "1"}))
    assert experiments.main(start) == 0
    text = (run / "sweep.md").read_text()
    for a in (0.0, 0.5):
        line = f"| **{a:g}** |"
        for b in (0.0, 0.5):
            names = [f"alpha{a}-beta{b}-seed{s}".replace(".", "_") for s in (0, 1)]
            results = [json.loads((run / f"sweep/{name}.json").read_text()) for name in names]
            assert all(r["made_from"]["weights of the loss"][:2] == [a, b] for r in results)
            f1 = [scores(r["labels"], r["predictions"])["weighted_f1"] for r in results]
            line += f" {sum(f1) / 2:.2f} ± {abs(f1[0] - f1[1]) / 2**0.5:.2f} |"
        assert line in text
    assert len(trained) == 8 and "synthetic" in text and (run / "figures/sweep.png").is_file()
    (run / "sweep/alpha0_5-beta0_0-seed1.json").unlink()
    assert experiments.main(start) == 0 and trained[8:] == ["alpha0_5-beta0_0-seed1"]


def test_presets_on_a_feature_file(tmp_path, trained, monkeypatch):
    monkeypatch.setitem(CONFIGS, "meld", CONFIG)
    write_features(tmp_path / "f.safetensors", example())
    options = f"presets --features {tmp_path}/f.safetensors --out {tmp_path}/x --seeds 2 --corpus meld".split()
    assert experiments.main(options) == 0
    rows = [x.split(" | ") for x in (tmp_path / "x/presets.md").read_text().splitlines() if x.startswith("| ")]
    results = [json.loads(path.read_text()) for path in (tmp_path / "x/presets").glob("*-seed0.json")]
    assert len(trained) == 2 * len(results) == 2 * len(rows) - 4 and all(" to " in row[4] for row in rows[3:])
    assert len({r["history"][-1]["dev"]["loss"] for r in results}) == len(results)  # each changes something
