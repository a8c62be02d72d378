"""README.md and docs/: tables are those of docs/results/*.json, links lead somewhere, what is to be run can be run."""

import json
import re
from pathlib import Path

import pytest
import torch
from test_features import example

from data import read_features, standardise, write_features
from extras import report

PROJECT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (PROJECT / "README.md", *PROJECT.glob("docs/*.md"))}
RESULTS = sorted(PROJECT.glob("docs/results/*.json"))
DIFFS = re.findall(r"In `(\w+\.py)`.*?```diff\n(.*?)```", PAGES["course.md"], re.DOTALL)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_pasted_tables_are_those_of_the_results(path):
    metrics = json.loads(path.read_text())
    assert report.results_table(metrics) in PAGES["results.md"]
    rows = {line for p in RESULTS for line in report.results_table(json.loads(p.read_text())).splitlines()}
    pasted = re.findall(r"^\| (?:T|A|V|A_KD|Concat|Context|MAGT)\b.*", PAGES["README.md"], re.MULTILINE)
    assert all(line in rows or line.removesuffix(" |  |") in rows for line in pasted)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    folder = PROJECT if name == "README.md" else PROJECT / "docs"
    text = re.sub(r"```.*?```|`[^`]*`|^    .*$", "", PAGES[name], flags=re.DOTALL | re.MULTILINE)  # without code
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert not [link for link in links if not (folder / link).exists()]


def test_the_route_from_a_csv_of_numbers_runs_as_printed(tmp_path, monkeypatch):
    """docs/corpora.md, on a small feature file: an empty cell is the mean, an utterance without a row has nothing."""
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", PAGES["corpora.md"], re.DOTALL) if "write_features" in x)
    monkeypatch.chdir(tmp_path)
    Path("runs/iemocap").mkdir(parents=True)
    file = example()
    write_features("runs/iemocap/features.safetensors", file)
    rows = [f"{name},{i},{1e5 * i if i else ''}" for i, name in enumerate(file.utterance_names[:-1])]
    Path("sound.csv").write_text("\n".join(["turn,pitch,loudness", *rows]))
    exec(code, {})
    file, moments = standardise(read_features(Path("with-audio.safetensors")))
    assert file.present["audio"].tolist() == [True] * len(rows) + [False]
    assert file.features["audio"][0, 1].abs() < 1e-6 and file.features["audio"].abs().max() < 10 and "audio" in moments


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_the_changes_of_the_course_apply(number):
    """To today's files, and those of fusion.py run."""
    name, diff = DIFFS[number - 1]
    old, new = ("".join(x[1:] for x in diff.splitlines(keepends=True) if x[0] in f"{sign} ") for sign in "-+")
    assert (source := (PROJECT / name).read_text("utf-8")).count(old) == 1
    code = compile(source.replace(old, new), name, "exec")
    if name == "fusion.py":
        exec(code, changed := {"__name__": "fusion"})  # dataclasses look for their module
        config = changed["FusionConfig"]({"text": 16}, num_classes=5, num_speakers=1, width=16, causal=True)
        given = {"text": torch.randn(6, 16)}, torch.ones(6, dtype=torch.int64), [3, 3], {"text": torch.arange(6) > 3}
        assert changed["MAGT"](config)(*given).logits["text"].isfinite().all()
