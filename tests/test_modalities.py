"""--modalities: a run on the words, or with sound or film alone, and what follows from it: rows, report, prediction."""

import csv
import json
import shutil
import sys

import pytest

import magtkd
from extras import predict

SHORT = ["--stage1-epochs", "1", "--stage2-epochs", "1", "--seeds", "1", "--encoders", "tiny", "--workers", "2"]
SHORT += ["--device", "cpu"]
ROWS = {  # of an ablation
    "text": ["T", *(f"{model} T" for model in ("Concat", "Context", "MAGT"))],
    "text,audio": ["T", "A", "A_KD", *(f"{m} {s}" for m in ("Concat", "Context", "MAGT") for s in ("T+A", "T+A_KD"))],
    "text,video": ["T", "V", "V_KD", *(f"{m} {s}" for m in ("Concat", "Context", "MAGT") for s in ("T+V_KD", "T+V"))],
}


@pytest.fixture(scope="module")
def words(meld, tmp_path_factory):
    """The corpus without any clip."""
    root = tmp_path_factory.mktemp("words") / "meld"
    return shutil.copytree(meld, root, ignore=shutil.ignore_patterns("*.mp4"))


@pytest.fixture(scope="module", params=ROWS)
def run(request, meld, words, tmp_path_factory):
    """(modalities, folder) of a whole run with the ablation."""
    out = tmp_path_factory.mktemp("runs") / request.param.replace(",", "-")
    root = words if request.param == "text" else meld
    options = ["meld", "--root", str(root), "--out", str(out), "--modalities", request.param, "--ablation", *SHORT]
    assert magtkd.main(options) == 0
    return request.param, out


def test_rows_and_report_follow(run):
    wanted, out = run
    metrics, report = json.loads((out / "metrics.json").read_text()), (out / "report.md").read_text()
    assert sorted(metrics["rows"]) == sorted(ROWS[wanted])
    assert all(f"| {row} |" in report for row in ROWS[wanted])
    assert len(metrics["comparisons"]) == 3 * (1 if wanted == "text" else 2)
    absent = {"audio", "video"} - set(wanted.split(","))
    made = [p.relative_to(out).as_posix() for p in out.rglob("*") if not p.relative_to(out).parts[0] == "tiny"]
    assert not [path for path in made for m in absent if path.startswith((m, f"media/{m}"))]
    assert all((out / "figures" / f"{name}.png").exists() for name in ("confusion", "gates", "losses"))


def test_predict_follows(run, meld, tmp_path, monkeypatch, capsys):
    """On typed words. Of a run on words, no file is opened: whatever else the table names is not used."""
    wanted, out = run
    rows = [{"speaker": "Ross", "text": "I am so happy"}, {"speaker": "Rachel", "text": "well, this is terrible"}]
    if wanted == "text":
        monkeypatch.setitem(sys.modules, "av", None)
        monkeypatch.setattr(predict, "load_audio", None)
        monkeypatch.setattr(predict, "load_frames", None)
        rows[0] |= {"audio": "missing.wav", "video": "missing.mp4"}
    with open(tmp_path / "talk.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["speaker", "text", "audio", "video"])
        writer.writeheader()
        writer.writerows(rows)
    assert predict.main(["--run", str(out), "--input", str(tmp_path / "talk.csv"), "--device", "cpu"]) == 0
    with open(tmp_path / "talk.emotions.csv", newline="") as f:
        answers = list(csv.DictReader(f))
    assert [a["speaker"] for a in answers] == ["Ross", "Rachel"]
    for a in answers:
        assert sum(float(x) for name, x in a.items() if name.startswith("p_")) == pytest.approx(1, abs=1e-3)
    missing = [a["missing"] for a in answers]
    assert missing == ["", ""] if wanted == "text" else all(wanted.split(",")[1] in line for line in missing)


@pytest.mark.parametrize("wanted", ["text,audio", "all"])
def test_a_modality_without_files_names_the_option(words, tmp_path, capsys, wanted):
    more = [] if wanted == "all" else ["--modalities", wanted]
    assert magtkd.main(["meld", "--root", str(words), "--out", str(tmp_path / "run"), *more, *SHORT]) == 2
    assert "--modalities text" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("wanted", ["audio", "audio,video", "text,words", "", "text;audio"])
def test_what_is_no_set_of_modalities(wanted, capsys):
    with pytest.raises(SystemExit) as end:
        magtkd.main(["meld", "--modalities", wanted])
    assert end.value.code == 2 and "wants text, or text with audio" in capsys.readouterr().err
