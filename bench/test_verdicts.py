"""The verdicts on rows made up to follow a law, whose right answer is known; and that what is stored is not stale."""

import json

import pytest

from bench.grid import CORPORA, COUNTED, FRAMES, MAGT_, MATCHED, PUBLISHED, SAMPLES, TIMED, UTTERANCES, Case
from bench.tables import RESULTS, load, markdown, results_path
from bench.verdicts import RIGHT, TERM, cheaper_from, cheaper_in_time_from, exponent, judge, verdicts


def row(case: Case, kind: str, **facts) -> dict:
    shape = {"variant": case.variant, "length": case.length, "width": case.width, "samples": SAMPLES, "params": 1}
    return {"kind": kind, **shape, **facts}


def rows_of_a_paper_that_is_right() -> list[dict]:
    """Attention alone, all of it: FLOPs 4 S L^2 D and 4 S U D, bytes S L D and S D, time in proportion to FLOPs."""
    rows = [{"kind": "encoder count", "samples": 1, "flops": 1}]
    for case in COUNTED:
        length = max(case.length) if isinstance(case.length, tuple) else case.length
        unit = length if case.variant == MAGT_ else length**2
        flops, kept = 4 * SAMPLES * unit * case.width, SAMPLES * case.width * (1 if case.variant == MAGT_ else length)
        counts = {"flops": flops, "flops_attention": flops, "flops_linear": 0, "bytes": kept, "bytes_unfused": kept}
        rows.append(row(case, "count", **counts))
        rows.append(row(case, "forward", seconds=1e-9 * flops))
    return rows


def test_a_right_paper_is_found_right():
    answers = {v.claim: v for v in verdicts(rows_of_a_paper_that_is_right())}
    grades = [v.verdict for v in answers.values()][:7]
    assert grades[:3] == [RIGHT] * 3
    assert all(grade.startswith(RIGHT) for grade in grades), grades
    assert "1 U/L^2, exactly, at 35 of 35" in answers["Time ratio MAGT / MulT = U/L^2, attention terms"].measured


def test_linear_layers_are_noticed():
    rows = rows_of_a_paper_that_is_right()
    for r in rows:
        if r["kind"] == "count" and r["variant"] == MATCHED:
            r["flops"] += 1000 * r["samples"] * r["length"] * r["width"] ** 2
    grades = [v.verdict for v in verdicts(rows)]
    assert grades[0] == TERM and grades[1] == RIGHT and grades[4].startswith("not so")


def test_exponent_and_judge():
    assert exponent({n: 7 * n**1.5 for n in (2, 3, 50)}) == pytest.approx(1.5)
    assert [judge(2, *fit) for fit in ((2, 2.04), (2, 1), (1.5, 1))] == [RIGHT, TERM, "not so"]


def test_crossings():
    for U in UTTERANCES:
        L, magt = cheaper_from(U), Case(MAGT_, U).flops(U).total
        assert Case(PUBLISHED, L - 1, 40).flops(U).total <= magt < Case(PUBLISHED, L, 40).flops(U).total
    seconds = {L: float(L**2) for L in FRAMES}
    rows = [row(Case(PUBLISHED, L, 40), "forward", seconds=s) for L, s in seconds.items()]
    for limit, expected in ((100.0**2, 100), (1.0, FRAMES[0]), (1e9, float("inf"))):
        at = [*rows, row(Case(MAGT_, 8), "forward", seconds=limit)]
        assert cheaper_in_time_from(at, 8) == pytest.approx(expected)


def test_machines_have_their_own_files():
    assert results_path({"device": "cpu"}).name == "cpu.json"
    assert results_path({"device": "cuda", "gpu": "NVIDIA H200"}).name == "h200.json"
    assert results_path({"device": "cuda", "gpu": "NVIDIA GeForce RTX 4090"}).name == "geforce-rtx-4090.json"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_stored_results_are_those_of_this_code(path):
    environment, rows = load(path)
    assert results_path(environment) == path
    stored = {(r["variant"], json.dumps(r["length"]), r["width"]): r for r in rows if r["kind"] == "count"}
    assert len(stored) == len(COUNTED)
    for case in COUNTED:
        flops, r = case.flops(SAMPLES), stored[case.variant, json.dumps(case.length), case.width]
        assert (r["flops_attention"], r["flops_linear"]) == flops
    utterances = {name: sum(corpus.lengths) for name, corpus in CORPORA.items()}
    assert {r["corpus"]: r["epoch_utterances"] for r in rows if r["kind"] == "corpus"} == utterances
    assert {r["corpus"] for r in rows if r["kind"] == "stage2"} == utterances.keys()
    for kind in ("forward", "step"):
        assert [r["name"] for r in rows if r["kind"] == kind] == [f"test_{kind}[{case}]" for case in TIMED]
    assert path.with_suffix(".md").read_text() == markdown(path)
