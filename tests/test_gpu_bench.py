"""The measurements on a GPU, as far as a CPU goes: every part at toy size, the arithmetic by hand, a bare machine."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nested._internal import sdpa

import magtkd
from bench import bare, gpu, gpu_correctness, gpu_hours, gpu_stage2
from data import MODALITIES
from fusion import MAGT, FusionConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """python -m bench.gpu --device cpu --toy: (exit code, what it wrote, its table)."""
    out = tmp_path_factory.mktemp("gpu") / "toy.json"
    code = gpu.main(["--device", "cpu", "--toy", "--out", str(out)])
    return code, json.loads(out.read_text()), out.with_suffix(".md").read_text()


def test_every_part_runs_and_no_time_is_made_up(toy):
    code, result, table = toy
    rows = result["rows"]
    assert code == 0, [r for r in rows if r.get("result") == "broken" or r.get("equal") is False]
    assert {r["part"] for r in rows} == {*gpu.parts(), "hours"}
    assert not [r for r in rows if r["name"] == "rest of the part"]
    for row in rows:
        for key, value in row.items():
            if key.startswith("seconds") or key.endswith("bytes") or key in ("FLOP/s", "forward", "step"):
                assert value in (gpu.NOT_MEASURED, "one batch alone"), (key, row)
    assert [r["result"] for r in rows if r["part"] == "hours"] == [gpu.NOT_MEASURED] * 2
    assert sum(line.startswith("| ") for line in table.splitlines()) == 1 + len(rows)


def test_what_the_toy_compares_is_equal(toy):
    rows = toy[1]["rows"]
    compared = [r for r in rows if "equal" in r]
    assert len(compared) > 25 and all(r["equal"] is True for r in compared)
    killed = next(r for r in rows if r["name"].startswith("killed"))
    assert killed["killed"] and killed["epochs before"] == 2
    ways = {r["way"]: r for r in rows if r["part"] == "stage 2" and "way" in r}
    assert ways.keys() == {"field code", *gpu_stage2.WAYS}
    assert {way for way, r in ways.items() if "why" in r} == {
        "nested attention",
        "varlen attention",
        "CUDA graph",
        "CUDA graph, padded attention",
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("attention", ["padded", "nested"])
def test_all_ways_to_attend_are_one_function(attention, monkeypatch):
    # torch's choice of a kernel for nested tensors asks a driver, even for those on the CPU
    monkeypatch.setattr(sdpa, "can_use_cudnn_attention", lambda *_, **__: False)
    torch.manual_seed(0)
    data = gpu_stage2.TOY.conversations(16, CPU)
    batch = data.batch(data.splits["train"])
    wanted, got = (
        gpu_stage2.make_model(gpu_stage2.TOY, 16, 2, way, CPU).eval()(*batch.inputs).logits
        for way in ("per conversation", attention)
    )
    for m in wanted:
        torch.testing.assert_close(got[m], wanted[m], rtol=1e-5, atol=1e-5)


def test_the_fields_plain_loop_has_our_loss():
    torch.manual_seed(0)
    data = gpu_stage2.TOY.conversations(16, CPU)
    names = data.splits["train"]
    model = gpu_stage2.make_model(gpu_stage2.TOY, 16, 2, "padded", CPU).eval()
    plain = copy.deepcopy(model)
    for block, attend in zip(plain.modules(), model.modules()):  # the copies attend with their own heads
        if "attend" in vars(attend):
            block.attend = gpu_stage2.partial(gpu_stage2.padded, block)
    ours = gpu_stage2.make_step(model, gpu_stage2.TOY, torch.float32)(data.batch(names))
    field = gpu_stage2.field_step(plain, gpu_stage2.TOY, data)(names)
    assert field == pytest.approx(float(ours), rel=1e-5)


def test_useful_flops_are_those_of_the_benchmark():
    from bench.measure import magt_flops

    config = FusionConfig(dict.fromkeys(MODALITIES, 768), 6, 2)
    assert gpu_stage2.useful_flops(config, [8, 47, 110]) == 3 * magt_flops(config, [8, 47, 110]).total


# A machine with torch and little else


def bare_module(monkeypatch):
    """bench/bare.py as it is where scikit-learn is missing."""
    for name in ("magtkd", "sklearn", "sklearn.metrics"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    spec = importlib.util.spec_from_file_location("bare_here", bare.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_bare_step_is_magtkds(monkeypatch):
    here = bare_module(monkeypatch)
    assert here.MISSING == "sklearn" and bare.MISSING is None and bare.fusion_losses is magtkd.fusion_losses
    data = gpu_stage2.TOY.conversations(16, CPU)
    batch = data.batch(data.splits["train"])
    weights = []
    for step in (here, magtkd):
        torch.manual_seed(0)
        model = MAGT(FusionConfig(dict.fromkeys(MODALITIES, 16), 4, 2, 16, 2)).train()
        optimizer, schedule = step.make_optimizer(model, 1e-2, 7, 0.3)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        for _ in range(4):
            loss = step.fusion_losses(model(*batch.inputs), batch, gpu_stage2.TOY)["loss"]
            step.optimizer_step(loss, model, optimizer, schedule, scaler, 1.0)
        weights.append([loss, *model.parameters()])
    for a, b in zip(*weights):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture
def bench(tmp_path):
    return gpu.Bench(CPU, True, tmp_path / "x.json", 8.0)


def test_what_is_missing_is_said_and_the_rest_goes_through(bench):
    def needs(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    given = {"first": lambda b: needs("av"), "second": lambda b: b.row("fine", equal=True)}
    assert gpu.run_parts(bench, given)
    assert [r.get("why") for r in bench.rows] == ["av is missing on this machine", None]
    assert not gpu.run_parts(bench, {"third": lambda b: needs("fusion")})  # not one that may be missing
    assert json.loads(bench.out.read_text())["rows"][-1]["result"] == "broken"


def test_a_failure_costs_its_part_alone_and_the_exit_code(bench):
    given = {"first": lambda b: 1 / 0, "second": lambda b: b.row("unequal", equal=False)}
    assert not gpu.run_parts(bench, given)
    assert [r["name"] for r in bench.rows] == ["rest of the part", "unequal"]
    bench.rows.pop(0)
    assert not gpu.run_parts(bench, {})  # unequal is enough


def test_after_the_minutes_the_rest_is_left_out(bench):
    bench.minutes = 0.0
    reached = []

    def part(b):
        b.row("kept")
        reached.append(b)

    assert gpu.run_parts(bench, {"first": part, "second": part})
    assert not reached and all(r["result"] == gpu.NOT_MEASURED for r in bench.rows)
    bench.minutes, bench.begun = 1.0, bench.begun - 59.9

    def slow(b):
        b.begun -= 1
        part(b)

    gpu.run_parts(bench, {"third": slow})
    assert [r["name"] for r in bench.found("third")] == ["kept", "rest of the part"] and not reached


def test_results_are_on_disk_at_any_moment(bench):
    bench.part = "p"
    bench.row("one", value=1.5)
    assert json.loads(bench.out.read_text())["rows"] == [{"part": "p", "name": "one", "value": 1.5}]


def test_the_cpu_is_for_toys_only(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "--toy" in capsys.readouterr().err


def test_without_a_card(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--device cpu --toy" in capsys.readouterr().err


# By hand


def test_hours_by_hand():
    """100/20/40 utterances. Decoding 160 x 9 s = 1440 s = 0.4 h. An encoder: 10 x 25 steps x 3.6 s = 900 s, and
    (10 x 20 + 160) x 5 s = 1800 s: 0.75 h. Fusion: 2 x 3 x 30 x 10 s x (1 + 60/100/3 = 1.2) = 2160 s = 0.6 h."""
    times = gpu_hours.Times({"text": 3.6}, {"text": 5.0}, epoch=10.0, decode=9.0)
    lines = gpu_hours.recipe({"train": 100, "dev": 20, "test": 40}, times)
    assert [x.what for x in lines] == ["decoding", "text encoder", "fusion"]
    assert [x.hours for x in lines] == pytest.approx([0.4, 0.75, 0.6])
    text = gpu_hours.table(lines)
    assert text[1] == (
        "text encoder: 10 epochs x 25 steps x 3.6 s + (10 x 20 + 160) utterances encoded x 5 s = 0.75 h (43 %)"
    )
    assert text[-1] == "cold: 1.75 h; with everything decoded before: 1.35 h"


def test_hours_without_the_decoding():
    times = gpu_hours.Times({"text": 3.6}, {"text": 5.0}, epoch=10.0, decode=None)
    text = gpu_hours.table(gpu_hours.recipe({"train": 100, "dev": 20, "test": 40}, times))
    assert len(text) == 3
    assert text[-1] == "cold: not measured (decoding was not); with everything decoded before: 1.35 h"


def test_hours_are_computed_from_the_rows(bench):
    bench.part = "encoders"
    for m in MODALITIES:
        bench.row("step", encoder=m, checkpointing=False, batch=4, seconds=0.1)
        bench.row("step", encoder=m, checkpointing=True, batch=4, seconds=99.0)
        bench.row("encoding", encoder=m, **{"seconds per utterance": 0.01})
    bench.part = "data path"
    bench.row("decoding", **{"seconds per utterance": 0.05})
    bench.part = "stage 2"
    for name in ("IEMOCAP", "MELD"):
        bench.row("step", way="as it stands", corpus=name, **{"seconds of an epoch": 1.0})
    bench.part = "hours"
    gpu.hours(bench)
    iemocap, meld = bench.found("hours")
    assert iemocap["name"] == "the recipe on IEMOCAP" and len(iemocap["arithmetic"]) == 6
    assert "10 epochs x 1,291 steps x 0.1 s" in iemocap["arithmetic"][1]  # 5,163 utterances in batches of 4
    assert "## the recipe on MELD" in gpu.markdown(bench)


def test_the_best_batch_by_hand():
    """Utterances per second: 40, 80, 100, 90; CUDA itself takes 0.6e9."""
    measured = {4: (5e9, 0.1), 8: (8e9, 0.1), 16: (20e9, 0.16), 32: (40e9, 32 / 90)}
    assert gpu_hours.best_batch(measured, 11e9) == 8
    assert gpu_hours.best_batch(measured, 20.5e9) == 8  # 20e9 and CUDA's own do not fit
    assert gpu_hours.best_batch(measured, 80e9) == 16
    assert gpu_hours.best_batch(measured, 5e9) is None


def test_a_difference_is_seen():
    a, b = torch.tensor([1.0, -2.0]), torch.tensor([1.0, -2.001])
    assert gpu_correctness.difference([a], [b]) == pytest.approx(0.0005, rel=0.01)
    assert gpu_correctness.distance([a], [b]) == pytest.approx(0.001 / 5**0.5, rel=0.01)
    with pytest.raises(ValueError):
        gpu_correctness.difference([a], [a, b])


def test_the_stored_rows_say_what_was_not_measured():
    """Results of a card are committed when one was at hand; the toy's always."""
    for path in Path(gpu.RESULTS).glob("*.json"):
        stored = json.loads(path.read_text())
        assert stored["environment"]["toy"] == (path.stem == "toy")
        assert path.with_suffix(".md").exists()
