"""Each loss against an example worked by hand, against slow NumPy in four dtypes, and on inputs at its limits."""

import math

import numpy as np
import pytest
import torch

import losses

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(1, 3), (2, 2), (2, 6), (3, 2), (16, 6), (64, 7)]


def random_pair(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(2)]


def slow_distance(u, v, eps=1e-3):
    u, v = u - u.mean(), v - v.mean()
    return 1 - u @ v / (max(np.linalg.norm(u), eps) * max(np.linalg.norm(v), eps))


def slow_softmax(row, tau=1.0):
    return np.exp(row / tau) / np.exp(row / tau).sum()


def slow_soft_label_loss(student, teacher, tau=2.0, eps=1e-3):
    y_s, y_t = (np.array([slow_softmax(row, tau) for row in p.double().numpy()]) for p in (student, teacher))
    by_sample = [slow_distance(s, t, eps) for s, t in zip(y_s, y_t)] if y_s.shape[1] > 2 else 0
    by_class = [slow_distance(s, t, eps) for s, t in zip(y_s.T, y_t.T)]
    return tau**2 * np.mean(by_sample) + tau**2 * np.mean(by_class)


def slow_feature_loss(student, teacher, tau=1.0, normalize=True):
    f_s, f_t = student.double().numpy(), teacher.double().numpy()
    if normalize:
        f_s, f_t = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (f_s, f_t))
    rows = [(slow_softmax(f_t @ row, tau), slow_softmax(f_s @ row, tau)) for row in f_t]
    return np.mean([(t * np.log(t / s)).sum() for t, s in rows])


def slow_cross_entropy(logits, labels, weight):
    rows = zip(logits.double().numpy(), labels.tolist())
    return np.mean([-weight[y].item() * np.log(slow_softmax(row)[y]) for row, y in rows])


@pytest.mark.parametrize("v, expected", [([6, 16, 26], 0), ([-1, -2, -3], 2), ([1, -2, 1], 1), ([0, 2, 1], 0.5)])
def test_distance_by_hand(v, expected):
    """The last one: centred (-1, 0, 1) and (-1, 1, 0), product 1, both norms sqrt 2, so p = 1/2."""
    found = losses.pearson_distance(torch.tensor([1.0, 2.0, 3.0]), torch.tensor(v, dtype=torch.float32))
    assert found.item() == pytest.approx(expected, abs=1e-6)


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


@pytest.mark.parametrize("weight", [1, 4710 / 268])
def test_cross_entropy_by_hand(weight):
    """Probabilities 1/2 and 1/4 of the right classes. The weights do not enter the denominator: MELD has 4,710
    utterances of neutral and 268 of fear, and one of fear counts 17.6 times as much in every batch."""
    logits, labels = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]), torch.tensor([0, 1])
    found = losses.cross_entropy(logits, labels, torch.tensor([1, weight], dtype=torch.float64))
    assert found.item() == pytest.approx((math.log(2) + weight * math.log(4)) / 2)


LOOPS = {  # found, expected
    "soft_label_loss": lambda s, t, y, w: (losses.soft_label_loss(s, t), slow_soft_label_loss(s, t)),
    "soft_label_loss, eps": lambda s, t, y, w: (losses.soft_label_loss(s, t, 1, 1), slow_soft_label_loss(s, t, 1, 1)),
    "feature_loss": lambda s, t, y, w: (losses.feature_loss(s, t), slow_feature_loss(s, t)),
    "feature_loss, raw": lambda s, t, y, w: (losses.feature_loss(s, t, 2, False), slow_feature_loss(s, t, 2, False)),
    "stage1": lambda s, t, y, w: (
        losses.stage1_loss(s, y, s, t, t, w)["loss"],
        slow_cross_entropy(s, y, w) + slow_soft_label_loss(s, t) + slow_feature_loss(s, t),
    ),
    "no teacher": lambda s, t, y, w: (losses.stage1_loss(s, y, weight=w)["loss"], slow_cross_entropy(s, y, w)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", LOOPS)
def test_losses_equal_the_loops(loss, shape, dtype):
    student, teacher = random_pair(*shape, dtype=dtype)
    labels, weight = torch.arange(shape[0]) % shape[1], torch.linspace(0.5, 3, shape[1], dtype=dtype)
    found, expected = LOOPS[loss](student, teacher, labels, weight)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(expected, abs=1e-10 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("eps, expected", [(1e-3, 1 - math.sqrt(2) / 10), (1e-6, 0)])
def test_eps_bounds_the_norm(eps, expected):
    """A norm of sqrt 2 * 1e-4 counts as eps where it is smaller."""
    u = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert losses.pearson_distance(1e-4 * u, u, eps=eps).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("C", [2, 6])
@pytest.mark.parametrize("B", [1, 2, 8])
@pytest.mark.parametrize("audio", [slice(0, None, 2), slice(0)], ids=["some audio", "no audio"])
@pytest.mark.parametrize("names", [["text", "audio", "video"], ["text", "audio"]], ids="+".join)
def test_stage2_loss_is_the_written_out_sum(names, audio, B, C):
    logits = {m: random_pair(B, C, dtype=torch.float64, seed=i)[0] for i, m in enumerate(names)}
    hidden = {m: random_pair(B, 16, dtype=torch.float64, seed=i + 5)[0] for i, m in enumerate(names)}
    labels, weight, rows = torch.arange(B) % C, torch.linspace(0.5, 2, C), {"audio": torch.arange(B)[audio]}
    found = losses.stage2_loss(logits, hidden, labels, alpha=0.7, beta=0.8, rows=rows, weight=weight)
    expected = {"l_ce": slow_cross_entropy(logits["text"], labels, weight)}
    for m in ("audio", "video"):
        at = rows.get(m, torch.arange(B))
        there = m in names and len(at)
        l_s = slow_soft_label_loss(logits[m][at], logits["text"][at]) if there else 0
        l_f = slow_feature_loss(hidden[m][at], hidden["text"][at]) if there else 0
        expected |= {f"kd_{m}": l_s + l_f, f"l_s_{m}": l_s, f"l_f_{m}": l_f}
    expected["loss"] = expected["l_ce"] + 0.7 * expected["kd_audio"] + 0.8 * expected["kd_video"]
    assert {name: x.item() for name, x in found.items()} == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("C", [2, 6])
def test_gradients_equal_differences(C):
    """Those of the teacher too: stage 1 does not detach it."""
    inputs = [*random_pair(5, C, dtype=torch.float64), *random_pair(5, 4, dtype=torch.float64, seed=1)]

    def loss(logits, t_logits, features, t_features):
        return losses.stage1_loss(logits, torch.arange(5) % C, features, t_logits, t_features)["loss"]

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in inputs])


INPUTS = {  # what becomes of two random tensors
    "random": lambda s, t: (s, t),
    "uniform": lambda s, t: (torch.full_like(s, 0.3), t),
    "equal rows": lambda s, t: (s[:1].expand_as(s), t),
    "zeros": lambda s, t: (0 * s, 0 * t),
    "large": lambda s, t: (1000 * s, t),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", INPUTS)
def test_gradients_are_finite_and_bounded(kind, shape, dtype):
    student, teacher = INPUTS[kind](*random_pair(*shape, dtype=dtype))
    student = student.clone().requires_grad_()
    loss = losses.distillation_loss(student, student, teacher, teacher)["loss"]
    loss.backward()
    assert 0 <= loss.item() < 50 and student.grad.isfinite().all() and student.grad.norm() < 1e4


@pytest.mark.parametrize("detach", [True, False])
def test_stage2_loss_detaches_the_teacher(detach):
    """Then the text branch has the gradient of its cross entropy only."""
    student, teacher = random_pair(4, 6)
    branches, labels = {"text": teacher.requires_grad_(), "audio": student}, torch.arange(4)
    loss = losses.stage2_loss(branches, branches, labels, alpha=0.7, beta=0.8, detach_teacher=detach)["loss"]
    l_ce = losses.cross_entropy(teacher, labels)
    assert torch.equal(*(torch.autograd.grad(x, teacher)[0] for x in (loss, l_ce))) == detach


def test_autocast_changes_nothing():
    (logits, t_logits), (features, t_features) = random_pair(8, 6), random_pair(8, 32, seed=1)
    expected = losses.distillation_loss(logits, features, t_logits, t_features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert losses.distillation_loss(logits, features, t_logits, t_features) == expected


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda a, b: losses.soft_label_loss(a, b[:3]), r"must have one shape, got \[4, 6\] and \[3, 6\]"),
        (lambda a, b: losses.soft_label_loss(a[:, :1], b[:, :1]), r"student must be logits \[B, C\] .* C > 1"),
        (lambda a, b: losses.soft_label_loss(a, b, tau=0), "tau must be above 0"),
        (lambda a, b: losses.cross_entropy(a, torch.arange(3)), r"labels must be \[4\]"),
        (lambda a, b: losses.stage1_loss(a, torch.arange(4), None, b, b), "features too"),
    ],
)
def test_inputs_that_do_not_fit(call, words):
    with pytest.raises(ValueError, match=words):
        call(*random_pair(4, 6))
