"""The losses of MAGTKD: Eq. 6-14, 24 and 25 of the paper, as pure functions of tensors.

    from losses import stage1_loss        # copy this file: it needs torch and nothing else

Why correlation. Text says more about an emotion than audio or video, so a text encoder (the teacher) trains the audio
and the video encoder (the students) besides the labels. A student of another modality cannot reach the teacher's
probabilities: its input contains less. KL divergence would ask for their exact values. Pearson's correlation asks for
less: the same order and the same relative distances. L_s (Eq. 9) asks for this twice. Along a row: which emotions are
plausible for this utterance, and which are not ("sad, perhaps frustrated, never happy"; a label says only "sad"). Along
a column: which utterances of the batch are the sad ones. L_f (Eq. 12) compares features, which have no common axes in
two modalities, only similarities: an utterance should resemble the same other utterances in both feature spaces.

Why detach. The teacher's tensors are targets. If gradients flow into them, the sum is easiest to lower by pulling the
teacher towards its weaker students, and the predictions of text become worse (docs/differences.md, row 15). No
function here detaches its teacher, except stage2_loss, where teacher and students are one model: pass
`teacher.detach()`, or outputs computed without gradients.

Every function accepts float16, bfloat16, float32 and float64, computes in float32 (float64 stays float64), and returns
a scalar with finite gradients, also for a single sample, equal rows or uniform logits. Pass valid rows only; there are
no masks. L_s and L_f compare samples within a batch. In batches of 4, L_s along columns is mostly noise; 16 is better.
Under DDP gather logits and features first, with `torch.distributed.nn.functional.all_gather`, which gives the gradient
of the full batch. `torch.distributed.all_gather` passes no gradient: with a rank's own rows put back in their place,
two ranks get half of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pearson_distance(u: Tensor, v: Tensor, dim: int = -1, eps: float = 1e-3) -> Tensor:
    """Eq. 6: d(u, v) = 1 - p(u, v), with p Pearson's correlation along `dim`; from 0 (p = 1) to 2 (p = -1).

    u, v: the same shape. The result lacks `dim`.
    eps: lower bound of each centred norm. A vector below it is nearly constant and has no direction; p then fades to 0
        (d to 1), and the gradient is bounded by 1/eps. The default suits probabilities of a few classes. For data on
        another scale choose eps far below its spread.
    """
    _check_same_shape("u", u, "v", v)
    u, v = _to_float(u), _to_float(v)
    u, v = u - u.mean(dim, keepdim=True), v - v.mean(dim, keepdim=True)
    norms = ((u * u).sum(dim).clamp(min=eps**2) * (v * v).sum(dim).clamp(min=eps**2)).sqrt()
    return 1 - (u * v).sum(dim) / norms


def soft_label_loss(student: Tensor, teacher: Tensor, tau: float = 2.0, eps: float = 1e-3) -> Tensor:
    """Eq. 7-9: L_s = tau^2/B sum_i d(Y^s_{i,:}, Y^t_{i,:}) + tau^2/C sum_j d(Y^s_{:,j}, Y^t_{:,j}), Y = softmax(P/tau).

    Also known as the DIST loss (Huang et al., NeurIPS 2022).

    student, teacher: logits P [B, C], C >= 2. tau: temperature, above 0.
    eps: see pearson_distance. With many classes the probabilities are small: at C = 10,000 and B = 64 the default makes
        the gradient 22 to 42 % too small; choose eps below 0.1 / C there.

    With two classes the first sum is left out: the correlation of two numbers is +1 or -1, a step function without
    gradient. (For the same reason the second sum has no gradient at B = 2, and at B = 1 it is a constant.)
    """
    _check_logits("student", student)
    _check_same_shape("student", student, "teacher", teacher)
    _check_tau(tau)
    y_s = F.softmax(_to_float(student) / tau, dim=1)  # Eq. 8
    y_t = F.softmax(_to_float(teacher) / tau, dim=1)  # Eq. 7
    by_class = pearson_distance(y_s, y_t, dim=0, eps=eps).mean()
    by_sample = pearson_distance(y_s, y_t, dim=1, eps=eps).mean() if student.shape[1] > 2 else 0.0
    return tau**2 * (by_sample + by_class)  # Eq. 9


def feature_loss(student: Tensor, teacher: Tensor, tau: float = 1.0, normalize: bool = True) -> Tensor:
    """Eq. 10-12: L_f = 1/B sum_i KL(T_i || S_i), T_i = softmax((F_t F_t^T)_i/tau), S_i = softmax((F_t F_s^T)_i/tau).

    T_i: the similarity of sample i to the samples of the batch, by the teacher's features. S_i: the same across teacher
    and student. (As printed, the denominators of Eq. 10-11 lack "/ tau"; they are softmaxes.)

    student, teacher: features F_s, F_t [B, d], the same d. tau: temperature, above 0.
    normalize: L2-normalise each row first, so that the products are cosines. False is the paper to the letter, where
        dot products of 768 numbers saturate the softmax.
    """
    if student.dim() != 2 or not student.shape[0]:
        raise ValueError(f"student must be features [B, d] with B > 0, got {list(student.shape)}")
    _check_same_shape("student", student, "teacher", teacher)
    _check_tau(tau)
    f_s, f_t = _to_float(student), _to_float(teacher)
    if normalize:  # eps: a row of zeros must not get a gradient of 1e12
        f_s, f_t = F.normalize(f_s, dim=1, eps=1e-3), F.normalize(f_t, dim=1, eps=1e-3)
    with torch.autocast(student.device.type, enabled=False):  # it would compute the two products in half precision
        log_t = F.log_softmax(f_t @ f_t.T / tau, dim=1)  # Eq. 10, [B, B]
        log_s = F.log_softmax(f_t @ f_s.T / tau, dim=1)  # Eq. 11, [B, B]
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)  # Eq. 12


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Eq. 13: L_CE, the mean over the batch. logits [B, C]; labels [B] int64, 0 to C - 1 (no ignore_index).

    weight: [C], any float type: sum_i w_{label i} CE_i / B. (torch's own mean divides by the weights of the batch, so
        that in a small batch a rare class counts for less than its weight.) Default: all 1, the paper.
    """
    _check_logits("logits", logits)
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels must be [{logits.shape[0]}], one per row of logits, got {list(labels.shape)}")
    logits = _to_float(logits)
    weight = None if weight is None else weight.to(logits.dtype)
    return F.cross_entropy(logits, labels, weight, reduction="sum") / len(labels)


# The sums. Each returns a dict: the sum under "loss", and its named parts, for a log. All are scalars.


def distillation_loss(
    student_logits: Tensor, student_features: Tensor, teacher_logits: Tensor, teacher_features: Tensor
) -> dict[str, Tensor]:
    """Eq. 24: L_KD = L_f + L_s for one student modality. Returns {"loss": L_KD, "l_s", "l_f"}.

    Logits [B, C], features [B, d].
    """
    l_s = soft_label_loss(student_logits, teacher_logits)
    l_f = feature_loss(student_features, teacher_features)
    return {"loss": l_f + l_s, "l_s": l_s, "l_f": l_f}


def stage1_loss(
    logits: Tensor,
    labels: Tensor,
    features: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    teacher_features: Tensor | None = None,
    weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """Eq. 14: L_all = L_CE + L_s + L_f, for a distilled encoder; without a teacher L_CE only.

    Returns {"loss": L_all, "l_ce", "l_s", "l_f"}, the last two with a teacher only.

    logits [B, C], labels [B], features [B, d]; teacher_logits and teacher_features likewise, both or neither.
    weight: [C], as for cross_entropy.
    """
    if (teacher_logits is None) != (teacher_features is None):
        raise ValueError("give both teacher_logits and teacher_features, or neither")
    l_ce = cross_entropy(logits, labels, weight)
    if teacher_logits is None:
        return {"loss": l_ce, "l_ce": l_ce}
    if features is None:
        raise ValueError("a teacher needs the student's features too")
    kd = distillation_loss(logits, features, teacher_logits, teacher_features)
    return {"loss": l_ce + kd["loss"], "l_ce": l_ce, "l_s": kd["l_s"], "l_f": kd["l_f"]}


def stage2_loss(
    logits: dict[str, Tensor],
    hidden: dict[str, Tensor],
    labels: Tensor,
    alpha: float,
    beta: float,
    rows: dict[str, Tensor] | None = None,
    weight: Tensor | None = None,
    detach_teacher: bool = True,
) -> dict[str, Tensor]:
    """Eq. 25: L_total = L_CE + alpha L_KD^a + beta L_KD^v. The teacher is the text branch of the same model.

    Returns {"loss": L_total, "l_ce", "kd_audio", "l_s_audio", "l_f_audio", "kd_video", "l_s_video", "l_f_video"}; the
    terms of a modality that is absent from `logits`, or has no row, are 0.

    logits: {modality: [N, C]}, "text" always, "audio" and "video" or not. hidden: {modality: [N, D]}. labels: [N].
    rows: {modality: [n] int64}, the utterances that have this modality; without an entry, all.
    weight: [C], as for cross_entropy.
    """
    teacher_logits, teacher_features = logits["text"], hidden["text"]
    if detach_teacher:
        teacher_logits, teacher_features = teacher_logits.detach(), teacher_features.detach()
    l_ce = cross_entropy(logits["text"], labels, weight)
    terms = {"l_ce": l_ce}
    for m in ("audio", "video"):
        at = (rows or {}).get(m, slice(None))
        kd = dict.fromkeys(("loss", "l_s", "l_f"), l_ce.new_zeros(()))
        if m in logits and len(labels[at]):
            kd = distillation_loss(logits[m][at], hidden[m][at], teacher_logits[at], teacher_features[at])  # Eq. 24
        terms |= {f"kd_{m}": kd["loss"], f"l_s_{m}": kd["l_s"], f"l_f_{m}": kd["l_f"]}
    return {"loss": l_ce + alpha * terms["kd_audio"] + beta * terms["kd_video"], **terms}  # Eq. 25


def _to_float(x: Tensor) -> Tensor:
    """float64 as it is, all other types as float32: in half precision Pearson's small norms underflow."""
    return x if x.dtype == torch.float64 else x.float()


def _check_same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{name_a} and {name_b} must have one shape, got {list(a.shape)} and {list(b.shape)}")


def _check_logits(name: str, x: Tensor) -> None:
    if x.dim() != 2 or x.shape[0] < 1 or x.shape[1] < 2:
        raise ValueError(f"{name} must be logits [B, C] with B > 0 and C > 1, got {list(x.shape)}")


def _check_tau(tau: float) -> None:
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}")
