"""Each loss against an example worked by hand, against slow loops in four dtypes, and on inputs at its limits."""

import math

import numpy as np
import pytest
import torch

import losses

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(1, 3), (2, 2), (2, 6), (3, 2), (16, 6), (64, 7)]


def random_pair(*shape, dtype=torch.float32, seed=0):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype).unbind()


def slow_distance(u, v, eps):
    u, v = u - u.mean(), v - v.mean()
    return 1 - u @ v / (max(np.linalg.norm(u), eps) * max(np.linalg.norm(v), eps))


def slow_soft_label_loss(student, teacher, tau=2.0, eps=1e-3):
    y_s, y_t = ((p.double() / tau).softmax(1).numpy() for p in (student, teacher))
    by_sample = [slow_distance(s, t, eps) for s, t in zip(y_s, y_t)] if y_s.shape[1] > 2 else 0
    by_class = [slow_distance(s, t, eps) for s, t in zip(y_s.T, y_t.T)]
    return tau**2 * np.mean(by_sample) + tau**2 * np.mean(by_class)


def slow_feature_loss(student, teacher, tau=1.0, normalize=True):
    f_s, f_t = (f.double() / (f.double().norm(dim=1, keepdim=True) if normalize else 1) for f in (student, teacher))
    rows = [((f_t @ row / tau).softmax(0), (f_s @ row / tau).softmax(0)) for row in f_t]
    return np.mean([(t * (t / s).log()).sum() for t, s in rows])


def slow_cross_entropy(logits, labels, weight):
    return np.mean([-weight[y].item() * row.double().softmax(0)[y].log() for row, y in zip(logits, labels)])


@pytest.mark.parametrize(
    "factor, v, eps, expected",
    [
        (1, [0, 2, 1], 1e-3, 0.5),  # centred (-1, 0, 1) and (-1, 1, 0), product 1, both norms sqrt 2, so p = 1/2
        (1e-4, [1, 2, 3], 1e-3, 1 - math.sqrt(2) / 10),  # a norm of sqrt 2 * 1e-4 counts as eps
        (1e-4, [6, 16, 26], 1e-6, 0),
    ],
)
def test_distance_by_hand_and_eps_bounds_the_norm(factor, v, eps, expected):
    u, v = factor * torch.tensor([1.0, 2.0, 3.0]), torch.tensor(v, dtype=torch.float32)
    assert losses.pearson_distance(u, v, eps=eps).item() == pytest.approx(expected, abs=1e-5)


def test_soft_label_loss_by_hand():
    student = torch.tensor([[3, 1, 2], [2, 2, 2]]).log()  # Y^s = (1/2, 1/6, 1/3) and (1/3, 1/3, 1/3)
    teacher = torch.tensor([[1, 2, 3], [2, 2, 2]]).log()  # Y^t = (1/6, 1/3, 1/2) and (1/3, 1/3, 1/3)
    by_sample = (3 / 2 + 1) / 2  # row 0: centred (1, -1, 0)/6 and (-1, 0, 1)/6, p = -1/2; row 1: constant, p = 0
    by_class = (2 + 1 + 1) / 3  # columns: p = -1; constant in the teacher; constant in the student
    assert losses.soft_label_loss(student, teacher, tau=1).item() == pytest.approx(by_sample + by_class, rel=1e-5)


def test_feature_loss_by_hand():
    """T_1 = softmax(1, 0) by two orthogonal unit vectors, of entropy 0.5822; S is uniform by two equal ones."""
    found = losses.feature_loss(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.eye(2))
    assert found.item() == pytest.approx(math.log(2) - 0.5822, abs=1e-4)


def test_cross_entropy_by_hand():
    """Probabilities 1/2 and 1/4. The weights do not enter the denominator: fear is worth 17.6 times neutral."""
    logits, weight = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]), torch.tensor([1, 4710 / 268], dtype=torch.float64)
    found = losses.cross_entropy(logits, torch.tensor([0, 1]), weight)
    assert found.item() == pytest.approx((math.log(2) + 4710 / 268 * math.log(4)) / 2)


LOOPS = {  # found, expected
    "soft_label_loss": lambda s, t, y, w: (losses.soft_label_loss(s, t), slow_soft_label_loss(s, t)),
    "soft_label_loss, eps": lambda s, t, y, w: (losses.soft_label_loss(s, t, 1, 1), slow_soft_label_loss(s, t, 1, 1)),
    "feature_loss": lambda s, t, y, w: (losses.feature_loss(s, t), slow_feature_loss(s, t)),
    "feature_loss, raw": lambda s, t, y, w: (losses.feature_loss(s, t, 2, False), slow_feature_loss(s, t, 2, False)),
    "stage1": lambda s, t, y, w: (
        losses.stage1_loss(s, y, s, t, t, w)["loss"],
        slow_cross_entropy(s, y, w) + slow_soft_label_loss(s, t) + slow_feature_loss(s, t),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", LOOPS)
def test_losses_equal_the_loops(loss, shape, dtype):
    student, teacher = random_pair(*shape, dtype=dtype)
    labels, weight = torch.arange(shape[0]) % shape[1], torch.linspace(0.5, 3, shape[1], dtype=dtype)
    found, expected = LOOPS[loss](student, teacher, labels, weight)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(float(expected), abs=1e-10 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize(
    "names, audio, detach",
    [("text audio video", [0, 2], True), ("text audio video", [], False), ("text audio", [0, 2], False)],
)
def test_stage2_loss_is_the_written_out_sum(names, audio, detach):
    """A detached teacher, text, has the gradient of its cross entropy only."""
    logits = {m: random_pair(4, 6, dtype=torch.float64, seed=i)[0] for i, m in enumerate(names.split())}
    hidden = {m: random_pair(4, 16, dtype=torch.float64, seed=i)[1] for i, m in enumerate(logits)}
    labels, weight = torch.arange(4), torch.linspace(0.5, 2, 6)
    expected = {"l_ce": slow_cross_entropy(logits["text"], labels, weight)}
    for m, at in (("audio", audio), ("video", [0, 1, 2, 3])):
        there = m in logits and at
        l_s = slow_soft_label_loss(logits[m][at], logits["text"][at]) if there else 0
        l_f = slow_feature_loss(hidden[m][at], hidden["text"][at]) if there else 0
        expected |= {f"kd_{m}": l_s + l_f, f"l_s_{m}": l_s, f"l_f_{m}": l_f}
    expected["loss"] = expected["l_ce"] + 0.7 * expected["kd_audio"] + 0.8 * expected["kd_video"]
    rows, teacher = {"audio": torch.tensor(audio, dtype=torch.int64)}, logits["text"].requires_grad_()
    found = losses.stage2_loss(logits, hidden, labels, 0.7, 0.8, rows, weight, detach)
    assert {name: x.item() for name, x in found.items()} == pytest.approx(expected, abs=1e-9)
    of_ce, of_loss = (torch.autograd.grad(found[x], teacher, retain_graph=True)[0] for x in ("l_ce", "loss"))
    assert torch.equal(of_ce, of_loss) == detach


@pytest.mark.parametrize("C", [2, 6])
def test_gradients_equal_differences_also_those_of_the_teacher(C):
    inputs = [x.requires_grad_() for x in random_pair(5, C, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda s, t: losses.stage1_loss(s, torch.arange(5) % C, s, t, t)["loss"], inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("of_student, of_teacher", [(1, 1), (0, 1), (0, 0), (1000, 1)])
def test_gradients_are_finite_and_bounded_and_autocast_changes_nothing(of_student, of_teacher, shape, dtype):
    student, teacher = random_pair(*shape, dtype=dtype)
    student, teacher = (student * of_student).requires_grad_(), teacher * of_teacher
    loss = losses.distillation_loss(student, student, teacher, teacher)["loss"]
    loss.backward()
    assert 0 <= loss.item() < 50 and student.grad.isfinite().all() and student.grad.norm() < 1e4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert losses.distillation_loss(student, student, teacher, teacher)["loss"] == loss


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda a, b: losses.soft_label_loss(a, b[:3]), r"must have one shape, got \[4, 6\] and \[3, 6\]"),
        (lambda a, b: losses.soft_label_loss(a[:, :1], b[:, :1]), r"student must be logits \[B, C\] .* C > 1"),
        (lambda a, b: losses.soft_label_loss(a, b, tau=0), "tau must be above 0"),
    ],
)
def test_inputs_that_do_not_fit(call, words):
    with pytest.raises(ValueError, match=words):
        call(*random_pair(4, 6))
