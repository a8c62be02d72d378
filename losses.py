"""The losses of MAGTKD: Eq. 6-14, 24 and 25 of the paper, as pure functions.

    from losses import distillation_loss        # copy this file: it needs torch and nothing else

A text model (the teacher) hands its knowledge to an audio or a video model (the student) in two ways: the student's
class probabilities should correlate with the teacher's (soft_label_loss, Eq. 9), and a batch should look alike in both
feature spaces (feature_loss, Eq. 12).

Every function takes logits or features in any floating type, computes in float32 (in half precision Pearson's small
norms underflow), and returns a float32 scalar whose gradient is finite, for one sample, for equal rows and for uniform
logits too. None of them detaches the teacher: pass `teacher.detach()`, or the teacher gives in to its students.

Not here: masks (pass valid rows only), modules with state, schedules of tau.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pearson_distance(u: Tensor, v: Tensor, dim: int = -1, eps: float = 1e-3) -> Tensor:
    """Eq. 6: d(u, v) = 1 - p(u, v), with p Pearson's correlation along `dim`; 0 (p = 1) to 2 (p = -1).

    u, v: the same shape; the result lacks `dim`.
    eps: floor of each centred norm. A vector below it is almost constant and has no direction to speak of: p then fades
    to 0 (d to 1), which bounds the gradient by 1/eps instead of letting it grow without limit. The default suits
    probabilities; for data on another scale give an eps far below its spread.
    """
    _same_shape("u", u, "v", v)
    u, v = u.float(), v.float()
    u, v = u - u.mean(dim, keepdim=True), v - v.mean(dim, keepdim=True)
    norms = ((u * u).sum(dim).clamp(min=eps**2) * (v * v).sum(dim).clamp(min=eps**2)).sqrt()
    return 1 - (u * v).sum(dim) / norms


def soft_label_loss(student: Tensor, teacher: Tensor, tau: float = 2.0) -> Tensor:
    """Eq. 7-9: L_s = tau^2/B sum_i d(Y^s_{i,:}, Y^t_{i,:}) + tau^2/C sum_j d(Y^s_{:,j}, Y^t_{:,j}); Y = softmax(P/tau).

    The first sum asks: does the student rank the classes of a sample as the teacher does? The second: does it rank the
    samples of a class so? This is the DIST loss (Huang et al., NeurIPS 2022), there between models of one modality.

    student, teacher: logits P [B, C], C at least 2. tau: temperature, above 0.
    With two classes the first sum is left out: Pearson's correlation of two numbers is +1 or -1, a step function, whose
    gradient is zero wherever it exists. (With B = 2 the second sum is such a step as well, with B = 1 a constant: they
    stay, and teach nothing.)
    """
    _logits("student", student)
    _same_shape("student", student, "teacher", teacher)
    _positive_tau(tau)
    y_s = F.softmax(student.float() / tau, dim=1)  # Eq. 8
    y_t = F.softmax(teacher.float() / tau, dim=1)  # Eq. 7
    by_class = pearson_distance(y_s, y_t, dim=0).mean()
    by_sample = pearson_distance(y_s, y_t, dim=1).mean() if student.shape[1] > 2 else 0.0
    return tau**2 * (by_sample + by_class)  # Eq. 9


def feature_loss(student: Tensor, teacher: Tensor, tau: float = 1.0, normalize: bool = True) -> Tensor:
    """Eq. 10-12: L_f = 1/B sum_i KL(T_i || S_i), T_i = softmax((F_t F_t^T)_i/tau), S_i = softmax((F_t F_s^T)_i/tau).

    Which samples of the batch does sample i resemble? T_i answers in the text features alone, S_i across text and
    student. (As printed, the denominators of Eq. 10-11 lack "/ tau"; they are softmaxes.)

    student, teacher: features F_s, F_t [B, d], the same d. tau: temperature, above 0.
    normalize: L2-normalise each row first, so that the products are cosines; False is the paper to the letter, where
    dot products of 768 numbers saturate the softmax.
    """
    if student.dim() != 2 or not student.shape[0]:
        raise ValueError(f"student must be features [B, d] with B > 0, got {list(student.shape)}")
    _same_shape("student", student, "teacher", teacher)
    _positive_tau(tau)
    f_s, f_t = student.float(), teacher.float()
    if normalize:  # eps: a row of zeros, say of a dead student, must not get a gradient of 1e12
        f_s, f_t = F.normalize(f_s, dim=1, eps=1e-3), F.normalize(f_t, dim=1, eps=1e-3)
    # Autocast would run the two products, and only them, in half precision.
    with torch.autocast(student.device.type, enabled=False):
        log_t = F.log_softmax(f_t @ f_t.T / tau, dim=1)  # Eq. 10, [B, B]
        log_s = F.log_softmax(f_t @ f_s.T / tau, dim=1)  # Eq. 11, [B, B]
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)  # Eq. 12


def distillation_loss(
    student_logits: Tensor, student_features: Tensor, teacher_logits: Tensor, teacher_features: Tensor
) -> Tensor:
    """Eq. 24: L_KD = L_f + L_s, for one student modality.

    Logits [B, C], features [B, d]. The temperatures are those of the functions above: 2 for L_s, 1 for L_f.
    """
    l_f = feature_loss(student_features, teacher_features)
    return l_f + soft_label_loss(student_logits, teacher_logits)


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Eq. 13: L_CE. logits [B, C]; labels [B], class indices (int64).

    weight: [C], how much a sample of each class counts in the mean over the batch. Default: all the same, the paper.
    """
    _logits("logits", logits)
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels must be [{logits.shape[0]}], one per row of logits, got {list(labels.shape)}")
    return F.cross_entropy(logits.float(), labels, weight)


def stage1_loss(
    logits: Tensor,
    labels: Tensor,
    features: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    teacher_features: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Eq. 14: L_all = L_CE + L_s + L_f, what a distilled encoder is trained with; without a teacher L_CE alone.

    logits [B, C], labels [B], features [B, d]; teacher_logits and teacher_features likewise, both or neither.
    weight: [C], as for cross_entropy.
    """
    if (teacher_logits is None) != (teacher_features is None):
        raise ValueError("give both teacher_logits and teacher_features, or neither")
    loss = cross_entropy(logits, labels, weight)
    if teacher_logits is None:
        return loss
    if features is None:
        raise ValueError("a teacher needs the student's features too")
    return loss + distillation_loss(logits, features, teacher_logits, teacher_features)


def stage2_loss(l_ce: Tensor, kd_audio: Tensor | float, kd_video: Tensor | float, alpha: float, beta: float) -> Tensor:
    """Eq. 25: L_total = L_CE + alpha L_KD^a + beta L_KD^v.

    l_ce: scalar, Eq. 13 on the text anchor's logits. kd_audio, kd_video: scalars, Eq. 24; 0.0 for an absent modality.
    """
    return l_ce + alpha * kd_audio + beta * kd_video


def _same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{name_a} and {name_b} must have one shape, got {list(a.shape)} and {list(b.shape)}")


def _logits(name: str, x: Tensor) -> None:
    if x.dim() != 2 or x.shape[0] < 1 or x.shape[1] < 2:
        raise ValueError(f"{name} must be logits [B, C] with B > 0 and C > 1, got {list(x.shape)}")


def _positive_tau(tau: float) -> None:
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}")
