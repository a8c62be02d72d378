"""What is measured: models, lengths, inputs, the stage-2 step, the encoders of stage 1.

Section 4.7 names no model: so MAGT over utterances, as in the paper, against MAGT over frames, the same weights, where
each utterance is a sequence of L rows. Then MulT, the frame-level model of the literature: with D and one layer (its
depth should not count against it), as published, and with the defaults of the authors' code. The two narrow ones have
inputs of 300, 74 and 35 (GloVe, COVAREP, Facet).

U utterances per conversation, L frames per utterance. Costs are given per utterance; FLOPs and bytes are proportional
to the number of utterances (tested). Timed calls are paired: each round times MAGT over utterances (REFERENCE) first.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from bench.cost import Flops, magt_flops, mult_flops
from bench.mult import MulT, MulTConfig
from fusion import MAGT, FusionConfig
from losses import stage2_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOW_BFLOAT16 = DEVICE == "cpu" and not torch.cpu.get_capabilities().get("avx512_bf16")  # minutes for a step
DTYPES = ["float32"] if SLOW_BFLOAT16 else ["float32", "bfloat16"]
MODALITIES = ("text", "audio", "video")
CLASSES, SPEAKERS = 6, 2
WIDTH = 768  # D of the paper

MAGT_U, MAGT_L = "MAGT over utterances", "MAGT over frames"
MATCHED, PUBLISHED, RELEASED = "MulT matched", "MulT as published", "MulT as released"
WIDTHS = {MAGT_U: WIDTH, MAGT_L: WIDTH, MATCHED: WIDTH, PUBLISHED: 40, RELEASED: 30}
HEADS = {MATCHED: 8, PUBLISHED: 8, RELEASED: 5}
LAYERS = {MATCHED: 1, PUBLISHED: 4, RELEASED: 5}
FRAME_MODELS = (MAGT_L, MATCHED, PUBLISHED, RELEASED)

UTTERANCES = (8, 32, 64, 128)  # U
FRAMES = (8, 16, 32, 128, 512)  # L, the same for the three modalities
ENCODED = (256, 249, 1569)  # vectors of text/audio/video that the paper's encoders give for an utterance, see ENCODERS
LENGTHS = {  # text/audio/video; the first three are those of MulT's paper
    (20, 20, 20): "aligned, IEMOCAP",
    (50, 50, 50): "aligned, MOSI",
    (50, 375, 500): "unaligned, MOSI",
    ENCODED: "the paper's encoders",
}

ROUNDS = 5  # the range of 5 values contains the median of their distribution with a probability of 1 - 2 / 2^5 = 94 %
# A timed call has MOST_UTTERANCES, or fewer where its forward pass would take more than MOST_FLOPS; a tenth for narrow
# models, which reach a tenth of the FLOP/s. On a CPU all models then have 64 rows or more, as REFERENCE.
MOST_UTTERANCES = {"cpu": 64, "cuda": 1024}
MOST_FLOPS = {"cpu": 2e10, "cuda": 1e12}


@dataclass(frozen=True)
class Case:
    """A model and the length of its sequences: utterances per conversation for MAGT_U, frames for the others."""

    model: str
    length: int | tuple[int, int, int]  # a tuple: text/audio/video

    def __str__(self) -> str:
        length = "/".join(map(str, self.length)) if isinstance(self.length, tuple) else self.length
        source = f" ({LENGTHS[self.length]})" if self.length in LENGTHS else ""
        return f"{self.model}, {'U' if self.model == MAGT_U else 'L'} = {length}{source}"

    @property
    def frames(self) -> dict[str, int]:
        return dict(zip(MODALITIES, self.length if isinstance(self.length, tuple) else (self.length,) * 3))

    @property
    def config(self) -> FusionConfig | MulTConfig:
        width = WIDTHS[self.model]
        inputs = (width, width, width) if width == WIDTH else (300, 74, 35)
        widths = dict(zip(MODALITIES, (1024, 768, 768) if self.length == ENCODED else inputs))
        if self.model in LAYERS:
            return MulTConfig(widths, CLASSES, width, HEADS[self.model], LAYERS[self.model])
        return FusionConfig(widths, CLASSES, SPEAKERS, width)

    @property
    def fewest(self) -> int:
        """Utterances of the smallest call: one conversation, or one utterance."""
        return self.length if self.model == MAGT_U else 1

    def flops(self, samples: int) -> Flops:
        """By the closed form, for `samples` utterances."""
        if self.model in LAYERS:
            return mult_flops(self.config, samples, self.frames)
        return magt_flops(self.config, [self.length] * (samples // self.fewest))

    def timed_samples(self, device: str) -> int:
        most = MOST_FLOPS[device] * (1 if WIDTHS[self.model] == WIDTH else 0.1) / sum(self.flops(self.fewest))
        return self.fewest * max(1, int(min(most, MOST_UTTERANCES[device] / self.fewest)))

    def build(self, device: str) -> nn.Module:
        """The model with random weights; without weights on the meta device."""
        return _build(self if self.length == ENCODED else replace(self, length=1), device)

    def inputs(self, samples: int, device: str) -> tuple:
        """Random inputs of the model's forward, `samples` utterances of one length."""
        if self.model not in LAYERS:
            return conversations([self.length] * (samples // self.fewest), device)
        widths = self.config.widths.items()
        return ({m: torch.randn(samples, self.frames[m], width, device=device) for m, width in widths},)


@lru_cache(maxsize=3)
def _build(case: Case, device: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        return MulT(case.config) if case.model in LAYERS else MAGT(case.config)


REFERENCE = Case(MAGT_U, 64)
CASES = [
    *(Case(MAGT_U, U) for U in UTTERANCES),
    *(Case(model, L) for model in FRAME_MODELS for L in FRAMES),
    *(Case(PUBLISHED, lengths) for lengths in LENGTHS),
]
QUICK = [Case(model, 8) for model in WIDTHS]  # for runs that take no times


def conversations(lengths: list[int], device: str) -> tuple:
    """Random arguments of MAGT.forward, in order: features, speakers, lengths. Nothing is missing."""
    N = sum(lengths)
    features = {m: torch.randn(N, WIDTH, device=device) for m in MODALITIES}
    return features, torch.randint(1, SPEAKERS + 1, (N,), device=device), lengths


def logits_of(output) -> list[Tensor]:
    """All logits of a MAGT or MulT."""
    return [output] if isinstance(output, Tensor) else list(output.logits.values())


def training_step(model: nn.Module, loss_of: Callable[[], Tensor], update: bool) -> Callable[[], Tensor]:
    """Forward and backward pass, with `update` also clipping and AdamW; returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if update else None

    def step() -> Tensor:
        loss = loss_of()
        loss.backward()
        if optimizer is not None:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.zero_grad()  # frees the gradients
        return loss.detach().cpu()

    return step


def timed_call(mode: str, case: Case, samples: int, device: str) -> Callable:
    """A forward pass in eval and inference mode, or for training a forward and backward pass with dropout.

    Without the optimizer, whose cost does not depend on the number of utterances. All timed calls return tensors on the
    CPU, so that they end when a GPU's work does.
    """
    model, inputs = case.build(device), case.inputs(samples, device)
    if mode == "inference":
        return torch.inference_mode()(lambda: [x.cpu() for x in logits_of(model.eval()(*inputs))])
    return training_step(model, lambda: sum(x.square().mean() for x in logits_of(model.train()(*inputs))), update=False)


# IEMOCAP's batch in Table 1, 16 conversations: the 16 quantiles of the training set's lengths.
STAGE2_LENGTHS = [26, 27, 31, 35, 38, 42, 44, 46, 49, 52, 53, 56, 60, 62, 69, 79]
STAGE2_MODES = ("float32", "bfloat16", "torch.compile", "CUDA graph")  # the last two have not been measured


def stage2_step(lengths: list[int], dtype: str, device: str) -> tuple[Callable[[], Tensor], Flops]:
    """One step as stage 2 trains (MAGT, Eq. 25, clipping, AdamW), and the FLOPs of its forward pass."""
    config = FusionConfig(dict.fromkeys(MODALITIES, WIDTH), CLASSES, SPEAKERS)
    model, inputs = MAGT(config).to(device), conversations(lengths, device)
    labels = torch.randint(0, CLASSES, (sum(lengths),), device=device)

    def loss_of() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            output = model(*inputs)
            return stage2_loss(output.logits, output.hidden, labels, alpha=0.7, beta=0.8)["loss"]

    return training_step(model, loss_of, update=True), magt_flops(config, lengths)


# The encoders of stage 1 at their published sizes: transformers' class, options, shape of one utterance's input.
# Data2Vec without what is random in it: layer drop and SpecAugment.
ROBERTA_LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
ROBERTA_LARGE |= dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
ENCODERS = {
    "RoBERTa-large, 256 tokens": ("Roberta", ROBERTA_LARGE, (256,)),
    "Data2Vec-audio-base, 5 s at 16 kHz": ("Data2VecAudio", {"layerdrop": 0.0, "apply_spec_augment": False}, (80_000,)),
    "TimeSformer-base, 8 frames of 224 x 224": ("Timesformer", {}, (8, 3, 224, 224)),
}


def encoder(name: str, device: str) -> tuple[nn.Module, Tensor]:
    """The model with random weights, in training mode, and the batch of Table 1, 4 utterances."""
    import transformers  # slow to import

    architecture, options, shape = ENCODERS[name]
    config = getattr(transformers, f"{architecture}Config")(**options)
    with torch.device(device):
        model = getattr(transformers, f"{architecture}Model")(config)
        inputs = torch.full((4, *shape), 5) if architecture == "Roberta" else torch.randn(4, *shape)  # 5: any token
    return model.train(), inputs


STEPS = [*(f"stage 2, {mode}" for mode in STAGE2_MODES), *ENCODERS]
ROWS = 3 * len(CASES) + len(DTYPES) + len(ENCODERS)  # of a complete run
