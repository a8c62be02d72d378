"""The tour: its numbers are those of direct calls, of a run on MELD's layout with clips missing and broken."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

import losses
import magtkd
from data import Conversations, Encoded, read_features, read_meld
from extras import tour

OPTIONS = "--stage1-epochs 1 --stage2-epochs 1 --seeds 1 --encoders tiny --workers 2".split()


@pytest.fixture(scope="module")
def run(meld, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "meld"
    assert magtkd.main(["meld", "--root", str(meld), "--out", str(out), *OPTIONS]) == 0
    return out


@torch.inference_mode()
def test_numbers(run, meld):
    file = read_features(run / "features.safetensors")
    net, kinds = magtkd.load_fusion(run / "fusion/MAGT-T+A_KD+V-seed0.safetensors")
    text, video = (Encoded(**load_file(run / f"{kind}.features.safetensors")) for kind in ("text", "video"))
    for name in (c.id for c in read_meld(meld).splits["test"]):
        values = tour.walk(run, name).values
        at = (file.conversation == file.conversation_names.index(name)) & file.present["video"]
        teaching = {"teacher_logits": text.logits[at], "teacher_features": text.features[at]}
        terms = losses.stage1_loss(video.logits[at], file.label[at], video.features[at], **teaching)
        assert values["L_all video = L_CE + L_s + L_f (14)"] == pytest.approx(float(terms["loss"]), abs=1e-4)
        y_t, y_s, t, s = (values[x] for x in ("Y^t_video (7)", "Y^s_video (8)", "T_i video (10)", "S_i video (11)"))
        l_s = sum(4 * losses.pearson_distance(y_s, y_t, dim).mean() for dim in (0, 1))
        assert values["L_s video (9)"] == pytest.approx(float(l_s), abs=1e-4)
        assert values["L_f video (12)"] == pytest.approx(float((t * (t / s).log()).sum(dim=1).mean()), abs=1e-4)
        batch = Conversations(file, kinds, torch.device("cpu")).batch([name])
        out, u = net(*batch.inputs), len(batch.labels) // 2
        terms = losses.stage2_loss(out.logits, out.hidden, batch.labels, 0.01, 0.09, batch.rows)
        assert values["L_total (25)"] == pytest.approx(float(terms["loss"]), rel=1e-5)
        torch.testing.assert_close(values["probabilities"], out.logits["text"][u].softmax(dim=-1))
        assert values["gate audio -> text (21)"] == pytest.approx(float(out.gates["text"]["audio"][u].mean()), abs=1e-5)
        assert torch.allclose(values["attention audio -> text"].sum(dim=1), torch.tensor(1.0))


def test_a_corpus_that_has_changed(run, meld, copy_of, tmp_path, capsys):
    root, copy = copy_of(meld), shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("media"))
    (copy / "config.json").write_text((run / "config.json").read_text().replace(str(meld), str(root)))
    for name, old, new, words in (
        ("test_sent_emo.csv", b",joy,", b",fear,", "has other utterances, labels or text than"),
        ("test/output_repeated_splits_test/dia1_utt1.mp4", b"moov", b"none", "from other media than today's"),
    ):
        content = (root / name).read_bytes()
        (root / name).write_bytes(content.replace(old, new, 1))
        assert tour.main(["--run", str(copy), "--conversation", "test_dia1"]) == 2
        assert words in capsys.readouterr().err and not (copy / "tour.md").exists()
        (root / name).write_bytes(content)


def test_the_command_line(run, capsys):
    """It overwrites its own tour.md, and no other."""
    assert [tour.main(["--run", str(run), *more]) for more in ([], [], ["--conversation", "nobody"])] == [0, 0, 2]
    (run / "tour.md").write_text("mine")
    assert tour.main(["--run", str(run)]) == 2 and (run / "tour.md").read_text() == "mine"
    said = capsys.readouterr()
    assert "L_total (25)" in said.out and "test has test_dia" in said.err and "is not overwritten" in said.err
