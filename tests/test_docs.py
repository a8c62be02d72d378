"""The tables of README.md and docs/ are what extras/report.py prints from docs/results/*.json; links lead somewhere."""

import json
import re
from pathlib import Path

import pytest
from test_features import example

from data import read_features, standardise, write_features
from extras import report

PROJECT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (PROJECT / "README.md", *PROJECT.glob("docs/*.md"))}
RESULTS = sorted(PROJECT.glob("docs/results/*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_pasted_tables_are_those_of_the_results(path):
    metrics = json.loads(path.read_text())
    assert report.results_table(metrics) in PAGES["results.md"]
    pasted = [line for line in PAGES["README.md"].splitlines() if line.startswith("| ")]
    tables = [report.results_table(json.loads(p.read_text())).splitlines() for p in RESULTS]
    rows = {line for table in tables for line in table}
    assert all(line in rows for line in pasted if re.match(r"\| (T|A|V|A_KD|Concat|Context|MAGT)\b", line))


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
