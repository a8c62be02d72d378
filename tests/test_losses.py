"""Each loss against an example worked by hand and a slow loop, in three dtypes, and where it could break."""

import math

import pytest
import torch

import losses
from losses import distillation_loss, feature_loss, pearson_distance, soft_label_loss, stage1_loss, stage2_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 3), (2, 2), (2, 6), (3, 2), (16, 6), (64, 7)]


def random_pair(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(2)]


# Slow, literal versions, in Python's own floats.


def naive_distance(u, v, eps=1e-3):
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    u, v = [x - mean_u for x in u], [x - mean_v for x in v]
    norms = max(math.sqrt(sum(x * x for x in u)), eps) * max(math.sqrt(sum(x * x for x in v)), eps)
    return 1 - sum(x * y for x, y in zip(u, v)) / norms


def naive_softmax(row, tau):
    e = [math.exp(x / tau) for x in row]
    return [x / sum(e) for x in e]


def naive_soft_label_loss(student, teacher, tau):
    y_s, y_t = ([naive_softmax(row, tau) for row in p.double().tolist()] for p in (student, teacher))
    B, C = student.shape
    by_sample = sum(naive_distance(y_s[i], y_t[i]) for i in range(B)) / B if C > 2 else 0
    by_class = sum(naive_distance([y[j] for y in y_s], [y[j] for y in y_t]) for j in range(C)) / C
    return tau**2 * by_sample + tau**2 * by_class


def naive_feature_loss(student, teacher, tau, normalize):
    f_s, f_t = student.double().tolist(), teacher.double().tolist()
    if normalize:
        f_s, f_t = ([[x / math.hypot(*row) for x in row] for row in f] for f in (f_s, f_t))
    total = 0
    for row in f_t:
        t = naive_softmax([dot(row, other) for other in f_t], tau)
        s = naive_softmax([dot(row, other) for other in f_s], tau)
        total += sum(a * math.log(a / b) for a, b in zip(t, s))
    return total / len(f_t)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


# Worked by hand.


def test_distance_by_hand():
    u = torch.tensor([1.0, 2.0, 3.0])
    assert pearson_distance(u, 10 * u - 4).item() == pytest.approx(0, abs=1e-6)
    assert pearson_distance(u, -u).item() == pytest.approx(2)
    assert pearson_distance(u, torch.tensor([1.0, -2.0, 1.0])).item() == pytest.approx(1)
    # centred (-1, 0, 1) and (-1, 1, 0): product 1, norms sqrt 2 each, p = 1/2
    assert pearson_distance(u, torch.tensor([0.0, 2.0, 1.0])).item() == pytest.approx(0.5)


def test_soft_label_loss_by_hand():
    # The student names the classes the other way round: d = 2 for each row and each column... with tau = 3 both
    # averages are weighted by 9.
    teacher = torch.tensor([[1.0, 0.0, -1.0], [-1.0, 0.0, 1.0]])
    softened = torch.softmax(teacher / 3, dim=1)
    rows = [naive_distance(softened[i].tolist(), softened[1 - i].tolist()) for i in (0, 1)]
    # columns 0 and 2 are reversed (d = 2), column 1 is constant (d = 1)
    expected = 9 * (sum(rows) / 2) + 9 * (2 + 1 + 2) / 3
    assert soft_label_loss(teacher.flip(0), teacher, tau=3).item() == pytest.approx(expected, rel=1e-5)


def test_feature_loss_by_hand():
    # Teacher: two orthogonal unit vectors, T_1 = softmax(1, 0); student: both rows equal to the first of them,
    # S_1 = softmax(1, 1), S_2 = softmax(0, 0): uniform. KL(T || uniform) = log 2 - H(T).
    teacher, student = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    p = math.e / (math.e + 1)
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert feature_loss(student, teacher).item() == pytest.approx(math.log(2) - entropy, rel=1e-5)


def test_totals_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    assert stage1_loss(logits, torch.tensor([0, 1])).item() == pytest.approx(math.log(2))
    assert stage2_loss(torch.tensor(1.0), torch.tensor(2.0), 3.0, 0.7, 0.8).item() == pytest.approx(1 + 1.4 + 2.4)


# Against the loops.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_soft_label_loss_equals_the_loop(shape, dtype):
    student, teacher = random_pair(*shape, dtype=dtype)
    for tau in (1.0, 2.0):
        expected = naive_soft_label_loss(student, teacher, tau)
        assert soft_label_loss(student, teacher, tau).item() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_feature_loss_equals_the_loop(shape, normalize, dtype):
    student, teacher = random_pair(*shape, dtype=dtype)
    for tau in (1.0, 2.0):
        expected = naive_feature_loss(student, teacher, tau, normalize)
        assert feature_loss(student, teacher, tau, normalize).item() == pytest.approx(expected, abs=2e-5)


def test_totals_are_the_sums_of_their_parts():
    (logits, t_logits), (features, t_features) = random_pair(8, 6), random_pair(8, 32, seed=1)
    labels = torch.arange(8) % 6
    kd = distillation_loss(logits, features, t_logits, t_features)
    assert torch.equal(kd, feature_loss(features, t_features) + soft_label_loss(logits, t_logits))
    total = stage1_loss(logits, labels, features, t_logits, t_features)
    assert torch.equal(total, losses.cross_entropy(logits, labels) + kd)


def test_a_perfect_student_loses_nothing():
    logits, features = random_pair(16, 6)[0], random_pair(16, 32)[0]
    assert distillation_loss(logits, features, logits, features).item() == pytest.approx(0, abs=1e-5)


# Where it could break.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["random", "uniform", "equal rows", "almost uniform", "zeros", "large"])
def test_gradients_are_finite_and_bounded(kind, shape, dtype):
    student, teacher = random_pair(*shape, dtype=dtype)
    if kind == "uniform":
        student = torch.full(shape, 0.3, dtype=dtype)
    elif kind == "equal rows":
        student, teacher = student[:1].repeat(shape[0], 1), teacher[:1].repeat(shape[0], 1)
    elif kind == "almost uniform":
        student = 1 + student * 1e-3
    elif kind == "zeros":
        student, teacher = torch.zeros_like(student), torch.zeros_like(teacher)
    elif kind == "large":
        student = student * 1000
    student = student.clone().requires_grad_()
    loss = distillation_loss(student, student, teacher, teacher)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and 0 <= loss.item() < 50
    assert student.grad.isfinite().all() and student.grad.norm() < 1e4


def test_two_classes_leave_the_sample_term_out():
    student, teacher = random_pair(8, 2)
    y_s, y_t = torch.softmax(student / 2, 1), torch.softmax(teacher / 2, 1)
    assert soft_label_loss(student, teacher) == 4 * pearson_distance(y_s, y_t, dim=0).mean()


def test_autocast_changes_nothing():
    (logits, t_logits), (features, t_features) = random_pair(8, 6), random_pair(8, 32, seed=1)
    expected = distillation_loss(logits, features, t_logits, t_features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distillation_loss(logits, features, t_logits, t_features), expected)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda a, b: soft_label_loss(a, b[:3]), r"student and teacher must have one shape, got \[4, 6\] and \[3, 6\]"),
        (lambda a, b: soft_label_loss(a[0], b[0]), r"student must be logits \[B, C\]"),
        (lambda a, b: soft_label_loss(a[:, :1], b[:, :1]), "C > 1"),
        (lambda a, b: soft_label_loss(a[:0], b[:0]), "B > 0"),
        (lambda a, b: soft_label_loss(a, b, tau=0), "tau must be above 0"),
        (lambda a, b: feature_loss(a, b[:, :5]), "one shape"),
        (lambda a, b: feature_loss(a[:0], b[:0]), "B > 0"),
        (lambda a, b: feature_loss(a, b, tau=-1), "tau must be above 0"),
        (lambda a, b: pearson_distance(a, b[0]), "one shape"),
        (lambda a, b: losses.cross_entropy(a, torch.zeros(3, dtype=torch.long)), r"labels must be \[4\]"),
        (lambda a, b: stage1_loss(a, torch.zeros(4, dtype=torch.long), teacher_logits=b), "both"),
        (lambda a, b: stage1_loss(a, torch.zeros(4, dtype=torch.long), None, b, b), "features too"),
    ],
)
def test_shapes_that_do_not_fit(call, words):
    with pytest.raises(ValueError, match=words):
        call(*random_pair(4, 6))


def test_weighted_cross_entropy_by_hand():
    """The mean of -log p, each sample counting as its class does."""
    logits, labels = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]]), torch.tensor([0, 1])
    expected = (3 * math.log(2) + 1 * math.log(4)) / 4
    weight = torch.tensor([3.0, 1.0])
    assert losses.cross_entropy(logits, labels, weight).item() == pytest.approx(expected)
    assert losses.stage1_loss(logits, labels, weight=weight).item() == pytest.approx(expected)
