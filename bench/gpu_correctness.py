"""Is the GPU right? Losses, MAGT, a step of each stage against the CPU; a run that is killed, and its second start.

In float32 the largest difference is held against the largest number of the CPU's answer, and must stay within 1e-4
(TF32 is off for this part). In bfloat16, which keeps 8 bits, the norm of the difference is held against the norm of the
answer: 3 % for logits, 10 % for gradients. Dropout is off throughout, since the devices draw different numbers.
"""

import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import losses
from bench.bare import fusion_losses
from bench.gpu_stage2 import CORPORA, TOY
from data import MODALITIES, Batch
from fusion import MAGT, Concat, FusionConfig, Past

EXACT, ROUGH, ROUGH_GRADIENTS = 1e-4, 0.03, 0.10


def difference(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference over the largest number of the wanted tensor; the worst of the tensors."""
    pairs = [(a.detach().float().cpu(), b.detach().float().cpu()) for a, b in zip(got, wanted, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs)


def distance(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The norm of all differences over the norm of all that was wanted."""
    a, b = (torch.cat([x.detach().float().cpu().flatten() for x in part]) for part in (got, wanted))
    return float((a - b).norm() / b.norm())


def compare(bench, name: str, run, model: nn.Module | None = None, bfloat16: bool = True) -> None:
    """run(device, model) -> tensors, then gradients: on the CPU and on the device, in float32 and under autocast."""
    models = {d: copy.deepcopy(model).to(d) if model else None for d in ("cpu", bench.device)}
    wanted, wanted_gradients = run("cpu", models["cpu"])
    got, gradients = run(bench.device, models[bench.device])
    worst = max(difference(got, wanted), difference(gradients, wanted_gradients) if gradients else 0.0)
    bench.row(name, type="float32", difference=worst, allowed=EXACT, equal=worst <= EXACT)
    if not bfloat16:
        return
    with torch.autocast(bench.device.type, torch.bfloat16):
        got, gradients = run(bench.device, models[bench.device])
    far = distance(got, wanted)
    facts = {"difference": far, "allowed": ROUGH, "equal": far <= ROUGH}
    if gradients:
        of_gradients = distance(gradients, wanted_gradients)
        facts |= {"of gradients": of_gradients, "allowed, gradients": ROUGH_GRADIENTS}
        facts["equal"] = facts["equal"] and of_gradients <= ROUGH_GRADIENTS
    bench.row(name, type="bfloat16", **facts)


def gradients_of(loss: Tensor, model: nn.Module) -> list[Tensor]:
    with torch.autocast(loss.device.type, enabled=False):
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [x for x in found if x is not None]


def of_losses(B: int, C: int = 6, d: int = 32):
    """The losses of stage 1 on random logits and features, and the gradients of the student's."""
    torch.manual_seed(B)
    logits, teacher, features, taught = torch.randn(B, C), torch.randn(B, C), torch.randn(B, d), torch.randn(B, d)
    labels = torch.randint(0, C, (B,))

    def run(device, _) -> tuple[list[Tensor], list[Tensor]]:
        s, f = (x.to(device).requires_grad_() for x in (logits, features))
        given = (s, labels.to(device), f, teacher.to(device), taught.to(device), torch.ones(C, device=device))
        values = [losses.soft_label_loss(s, given[3]), losses.feature_loss(f, given[4]), losses.stage1_loss(*given)]
        return values, list(torch.autograd.grad(values[-1], [s, f]))

    return run


def of_fusion(lengths: list[int], width: int, missing: bool):
    """All logits of a fusion model, and the gradients of Eq. 25."""
    torch.manual_seed(len(lengths))
    N = sum(lengths)
    features = {m: torch.randn(N, width) for m in MODALITIES}
    speakers, labels = torch.randint(0, 3, (N,)), torch.randint(0, 4, (N,))
    present = {"audio": torch.arange(N) % 3 > 0} if missing else {}

    def run(device, model) -> tuple[list[Tensor], list[Tensor]]:
        def to(x: dict) -> dict:
            return {m: y.to(device) for m, y in x.items()}

        inputs = (to(features), speakers.to(device), lengths, to(present))
        out = model.eval()(*inputs)
        if len(out.logits) < len(MODALITIES) or missing:  # Concat has no students; with gaps the rows would differ
            loss = losses.cross_entropy(out.logits["text"], labels.to(device))
        else:
            loss = fusion_losses(out, Batch(inputs, labels.to(device), {}), TOY)["loss"]
        return [*out.logits.values(), loss], gradients_of(loss, model)

    return run


def of_stream(width: int, turns: int = 6):
    """A causal MAGT, an utterance at a time, in two conversations."""
    torch.manual_seed(0)
    features = [{m: torch.randn(2, width) for m in MODALITIES} for _ in range(turns)]

    @torch.inference_mode()
    def run(device, model) -> tuple[list[Tensor], list[Tensor]]:
        past, speakers = Past(), torch.ones(2, dtype=torch.int64, device=device)
        turns = ({m: x.to(device) for m, x in turn.items()} for turn in features)
        return [model.eval().step(past, turn, speakers).logits["text"] for turn in turns], []

    return run


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def small_encoders() -> dict[str, tuple[nn.Module, Tensor]]:
    """The three families with random weights and without chance, and a batch of two."""
    text = transformers.RobertaConfig(vocab_size=100, max_position_embeddings=66, **SIZE, **NO_DROPOUT)
    sound = {"hidden_dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0}
    steps = {"conv_dim": (32,) * 4, "conv_kernel": (20, 4, 2, 2), "conv_stride": (20, 4, 2, 2)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    audio = transformers.Data2VecAudioConfig(
        layerdrop=0.0, apply_spec_augment=False, **SIZE, **sound, **steps, **positions
    )
    video = transformers.TimesformerConfig(image_size=48, patch_size=12, num_frames=8, **SIZE, **NO_DROPOUT)
    torch.manual_seed(0)
    return {
        "text": (transformers.RobertaModel(text, add_pooling_layer=False), torch.randint(3, 100, (2, 20))),
        "audio": (transformers.Data2VecAudioModel(audio), torch.randn(2, 4000)),
        "video": (transformers.TimesformerModel(video), torch.randn(2, 8, 3, 48, 48)),
    }


def of_encoder(inputs: Tensor, C: int = 6):
    """Eq. 14 on an encoder's mean over time, with a random teacher; its features and the gradients."""
    torch.manual_seed(0)
    head, teacher, taught = torch.randn(SIZE["hidden_size"], C), torch.randn(2, C), torch.randn(2, SIZE["hidden_size"])

    def run(device, model) -> tuple[list[Tensor], list[Tensor]]:
        features = model.train()(inputs.to(device)).last_hidden_state.mean(dim=1)
        logits = features @ head.to(device)
        labels = torch.tensor([1, 2], device=device)
        loss = losses.stage1_loss(logits, labels, features, teacher.to(device), taught.to(device))
        return [features, loss], gradients_of(loss, model)

    return run


# A kill between two starts


def tiny_training(folder: Path, device: torch.device, die_after: int | None) -> list[dict]:
    """Four epochs of magtkd.train on a small MAGT. die_after: the epoch after which the process kills itself."""
    import magtkd

    torch.manual_seed(0)
    data = TOY.conversations(16, torch.device(device))
    model = MAGT(FusionConfig(dict.fromkeys(MODALITIES, 16), TOY.classes, 2, 16, 2, dropout=0.2)).to(device)
    done = []

    def loss_terms(names: list[str]) -> dict[str, Tensor]:
        batch = data.batch(names)
        return fusion_losses(model(*batch.inputs), batch, TOY)

    def evaluate() -> dict:
        if die_after is not None and len(done) == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(0)
        return {"dev_f1": 0.0}

    folder.mkdir(exist_ok=True)
    recipe = magtkd.Recipe(lr=1e-3, batch=2, epochs=4, precision="float32")
    return magtkd.train(model, dict.fromkeys(data.splits["train"], 1), loss_terms, evaluate, recipe, folder / "m", 0)


def kill_and_start_again(bench) -> None:
    import magtkd  # noqa: F401  where it is missing, the row says so before a process is started

    with tempfile.TemporaryDirectory() as folder:
        undisturbed = tiny_training(Path(folder) / "whole", bench.device, None)
        program = (
            "import sys, torch; from pathlib import Path; from bench.gpu_correctness import tiny_training;"
            "tiny_training(Path(sys.argv[1]), torch.device(sys.argv[2]), 2)"
        )
        killed = Path(folder) / "killed"
        done = subprocess.run(
            [sys.executable, "-c", program, str(killed), str(bench.device)], cwd=Path(__file__).parents[1]
        )
        left = (killed / "m.resume.pt").exists()
        epochs = [json.loads(line)["epoch"] for line in (killed / "log.jsonl").read_text().splitlines()] if left else []
        continued = tiny_training(killed, bench.device, None)
    loss, wanted = (torch.tensor([epoch["train"]["loss"] for epoch in h]) for h in (continued, undisturbed))
    worst = difference([loss], [wanted])
    was_killed = done.returncode == -signal.SIGKILL and left
    facts = {"killed": was_killed, "epochs before": len(epochs), "difference": worst, "allowed": EXACT}
    bench.row("killed after 2 of 4 epochs, started again", **facts, equal=was_killed and worst <= EXACT)


def measure(bench) -> None:
    width, heads = (16, 2) if bench.toy else (768, 8)
    lengths = TOY.lengths["train"] if bench.toy else CORPORA[0].lengths["train"][:16]
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        for B in (1, 2, 64):
            compare(bench, f"losses, batch {B}", of_losses(B), bfloat16=False)  # they compute in float32 in any case
        for name, build, causal in (("MAGT", MAGT, False), ("MAGT, causal", MAGT, True), ("Concat", Concat, False)):
            model = build(FusionConfig(dict.fromkeys(MODALITIES, width), 4, 2, width, heads, causal=causal))
            for missing in (False, True):
                what = f"{name}, {'sound missing' if missing else 'a step of stage 2'}"
                compare(bench, what, of_fusion(lengths, width, missing), model)
            if causal:
                compare(bench, f"{name}, one utterance at a time", of_stream(width), model)
        for name, (model, inputs) in small_encoders().items():
            compare(bench, f"{name} encoder, small, a step of stage 1", of_encoder(inputs), model)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    kill_and_start_again(bench)
