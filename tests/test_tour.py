"""The tour: its numbers are those of direct calls, of a run on MELD's layout with clips missing and broken."""

import re
from pathlib import Path

import pytest
import torch

import losses
import magtkd
from data import Conversations, read_encoded, read_meld
from extras import tour
from extras.drawing import equations
from extras.features import read_features

SHORT = ["--stage1-epochs", "1", "--stage2-epochs", "1", "--seeds", "1", "--encoders", "tiny", "--workers", "2"]


@pytest.fixture(scope="module")
def run(meld, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "meld"
    assert magtkd.main(["meld", "--root", str(meld), "--out", str(out), *SHORT]) == 0
    return out


@pytest.fixture(scope="module")
def board(run):
    return tour.tour(run)


def rows_of(run, conversation):
    """The conversation's rows of the feature file, and its answers of each encoder."""
    file = read_features(run / "features.safetensors")
    at = file.conversation == file.conversation_names.index(conversation)
    answers = {k: read_encoded(run / f"{k}.features.safetensors", file.utterance_names) for k in file.features}
    return file, {k.removesuffix("_kd"): [x[at] for x in answer] for k, answer in answers.items()}, file.label[at]


def title(board):
    return board.lines[0].split(": ")[1].split(" of ")[0]


def test_stage_1(run, board):
    _, answers, labels = rows_of(run, title(board))
    t_features, t_logits = answers["text"]
    assert board.values["text: L_CE (13)"] == pytest.approx(float(losses.cross_entropy(t_logits, labels)), abs=1e-5)
    checked = 0
    for m in ("audio", "video"):
        features, logits = answers[m]
        there = ~features.isnan().any(dim=1)
        student, teacher = (logits[there], features[there]), (t_logits[there], t_features[there])
        if there.any():
            l_s = float(losses.soft_label_loss(student[0], teacher[0]))
            l_f = float(losses.feature_loss(student[1], teacher[1]))
            total = losses.stage1_loss(student[0], labels[there], student[1], *teacher)
            assert board.values[f"L_s {m} (9)"] == pytest.approx(l_s, abs=1e-4)
            assert board.values[f"L_f {m} (12)"] == pytest.approx(l_f, abs=1e-5)
            assert board.values[f"L_all {m} = L_CE + L_s + L_f (14)"] == pytest.approx(float(total), abs=1e-4)
            y = (student[0] / 2).softmax(dim=1)  # Eq. 8, tau 2
            torch.testing.assert_close(board.values[f"Y^s_{m} (8)"], y, atol=1e-5, rtol=0)
            t = torch.nn.functional.normalize(teacher[1])
            torch.testing.assert_close(board.values[f"T_i {m} (10)"], (t @ t.T).softmax(dim=1), atol=1e-4, rtol=0)
            checked += 1
    assert checked


@torch.inference_mode()
def test_stage_2(run, board):
    file = read_features(run / "features.safetensors")
    net, kinds = magtkd.load_fusion(run / "fusion.safetensors")
    batch = Conversations(file, kinds, torch.device("cpu")).batch([title(board)])
    out = net(*batch.inputs)
    terms = magtkd.fusion_losses(out, batch, magtkd.CONFIGS["meld"])
    for symbol, term in (("L_total (25)", "loss"), ("L_KD audio (24)", "kd_audio"), ("L_KD video (24)", "kd_video")):
        assert board.values[symbol] == pytest.approx(float(terms[term]), rel=1e-5)
    u = len(batch.labels) // 2
    torch.testing.assert_close(board.values["probabilities"], out.logits["text"][u].softmax(dim=-1))
    torch.testing.assert_close(board.values["t'"], out.hidden["text"])
    assert board.values["largest difference"] < 1e-4

    # One stream by hand: audio asks, text answers.
    h, _ = net.tag(*batch.inputs, None)
    block, heads = net.anchor["audio"].block["text"], net.config.heads
    asked, keys = block.query(h["audio"]), block.key_value(h["text"])[:, : net.config.width]
    q, k = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (asked, keys))
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(dim=-1).mean(dim=0)
    torch.testing.assert_close(board.values["attention"]["audio", "text"], weights, atol=1e-5, rtol=1e-4)
    answer = block(h["audio"], h["text"], batch.inputs[2])
    gate = net.anchor["audio"].alpha("text", answer)[u]
    assert board.values["gate text -> audio (21)"] == pytest.approx(float(gate.mean()), abs=1e-5)
    assert board.values["gated text -> audio"] == pytest.approx(float((answer[u] * gate).norm()), abs=1e-4)


def test_what_is_printed_is_what_was_computed(board):
    text = board.text()
    scalars = {k: v for k, v in board.values.items() if isinstance(v, float) and not k.startswith("gated")}
    assert len(scalars) > 15
    for symbol, value in scalars.items():
        assert f"{symbol} = {value:.4f}" in text
    assert "](" not in text and "```" not in text


def test_the_links_lead_to_the_functions(run, board):
    links = re.findall(r"\[(\w+)\.py:([\w.]+)\]\((.+?)#L(\d+)\)", "\n".join(board.lines))
    for module, function, file, number in links:
        path = (run / file).resolve()
        line = path.read_text().splitlines()[int(number) - 1]
        assert path == Path(tour.__file__).parent.parent / f"{module}.py"
        assert re.search(rf"(def|class) {function.split('.')[-1]}\b", line), (function, line)
    numbers = {n for line in board.lines if "](" in line for n in equations(line)}
    assert numbers == set(range(1, 26)) and len(links) > 12


def test_every_conversation_can_be_walked_through(run, meld):
    """Those with clips missing and broken too; and the model is the same after it."""
    corpus = read_meld(meld)
    for conversation in corpus.splits["test"] + corpus.splits["dev"]:
        board = tour.tour(run, conversation.id)
        assert title(board) == conversation.id
        assert all(v == v for v in board.values.values() if isinstance(v, float))


def test_the_command_line(run, capsys, tmp_path):
    assert tour.main(["--run", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "L_total (25)" in printed and str(run / "tour.md") in printed
    assert "](" in (run / "tour.md").read_text()
    assert tour.main(["--run", str(run), "--conversation", "nobody"]) == 2
    assert "there is none; test has test_dia" in capsys.readouterr().err
    assert tour.main(["--run", str(tmp_path / "none")]) == 2
    assert "no finished run" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
