"""What is measured: models, lengths, inputs, the stage-2 step, the encoders of stage 1.

Granularity by itself (section 4.7 names no model): MAGT over utterances, as in the paper, against MAGT over frames, the
same weights, where each utterance is a sequence of L rows. Then MulT, the frame-level model of the literature:

    matched       D = 768, 8 heads, one layer in every encoder and memory, inputs of width D. (The authors' rule gives
                  the memories 3 layers at least; that would count against MulT for its depth, not for its frames.)
    as published  d = 40, 8 heads, 4 layers, inputs of 300, 74 and 35 (GloVe, COVAREP, Facet)
    as released   the defaults of the authors' code: d = 30, 5 heads, 5 layers

U utterances per conversation, L frames per utterance. Costs are given per utterance; FLOPs and bytes are proportional
to the number of utterances (tested). Timed calls are paired: each round times MAGT over utterances (REFERENCE) first.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from bench.cost import SEED, Flops, bfloat16_is_fast, magt_flops, mult_flops
from bench.mult import MulT, MulTConfig
from fusion import MAGT, FusionConfig
from losses import stage2_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ["float32", "bfloat16"] if bfloat16_is_fast(DEVICE) else ["float32"]
MODALITIES = ("text", "audio", "video")
CLASSES, SPEAKERS = 6, 2
WIDTH, HEADS = 768, 8  # D of the paper

MAGT_U, MAGT_L = "MAGT over utterances", "MAGT over frames"
MATCHED, PUBLISHED, RELEASED = "MulT matched", "MulT as published", "MulT as released"
WIDTHS = {MAGT_U: WIDTH, MAGT_L: WIDTH, MATCHED: WIDTH, PUBLISHED: 40, RELEASED: 30}
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
# A timed call has MOST_UTTERANCES, or fewer where its forward pass would take more than MOST_FLOPS. Narrow models reach
# a tenth of the FLOP/s of D = 768, so they get a tenth. On a CPU all models then have 64 rows or more, as REFERENCE.
MOST_UTTERANCES = {"cpu": 64, "cuda": 1024}
MOST_FLOPS = {"cpu": 2e10, "cuda": 1e12}


@dataclass(frozen=True)
class Case:
    """A model and the length of its sequences: utterances per conversation for MAGT_U, frames for the others."""

    model: str
    length: int | tuple[int, int, int]  # a tuple: text/audio/video
    width: int

    def __str__(self) -> str:
        length = "/".join(map(str, self.length)) if isinstance(self.length, tuple) else self.length
        source = f" ({LENGTHS[self.length]})" if self.length in LENGTHS else ""
        return f"{self.model}, {'U' if self.model == MAGT_U else 'L'} = {length}{source}"

    @property
    def frames(self) -> dict[str, int]:
        return dict(zip(MODALITIES, self.length if isinstance(self.length, tuple) else (self.length,) * 3))

    @property
    def input_widths(self) -> tuple[int, int, int]:
        if self.length == ENCODED:
            return 1024, 768, 768
        return (300, 74, 35) if self.model in (PUBLISHED, RELEASED) else (self.width,) * 3

    @property
    def config(self) -> FusionConfig | MulTConfig:
        widths = dict(zip(MODALITIES, self.input_widths))
        if self.model in (MAGT_U, MAGT_L):
            return FusionConfig(widths, CLASSES, SPEAKERS, width=self.width, heads=HEADS)
        layers = {
            MATCHED: {"heads": HEADS, "layers": 1, "memory_layers": 1},
            PUBLISHED: {"heads": 8, "layers": 4, "memory_layers": 4},
            RELEASED: {"heads": 5, "layers": 5, "memory_layers": 5},
        }
        return MulTConfig(widths, CLASSES, self.width, **layers[self.model])

    def flops(self, samples: int) -> Flops:
        """By the closed form, for `samples` utterances."""
        if self.model in (MAGT_U, MAGT_L):
            return magt_flops(self.config, self.rows(samples))
        return mult_flops(self.config, samples, self.frames)

    def rows(self, samples: int) -> list[int]:
        """Lengths of MAGT's sequences: conversations of U utterances, or utterances of L frames."""
        return [self.length] * (samples // self.length if self.model == MAGT_U else samples)

    def build(self, device: str) -> nn.Module:
        """The model with random weights; without weights on the meta device."""
        model = MAGT_U if self.model == MAGT_L else self.model
        return _build(replace(self, model=model, length=ENCODED if self.length == ENCODED else 1), device)

    def inputs(self, samples: int, device: str) -> tuple:
        """Random inputs of the model's forward, `samples` utterances of one length."""
        if self.model in (MAGT_U, MAGT_L):
            return conversations(self.rows(samples), self.width, device)
        widths = self.config.widths.items()
        return ({m: torch.randn(samples, self.frames[m], width, device=device) for m, width in widths},)

    @property
    def fewest(self) -> int:
        """One conversation, or one utterance."""
        return self.length if self.model == MAGT_U else 1

    def timed_samples(self, device: str) -> int:
        samples, most = MOST_UTTERANCES[device], MOST_FLOPS[device] * (1 if self.width == WIDTH else 0.1)
        while samples > self.fewest and self.flops(samples).total > most:
            samples //= 2
        return max(samples, self.fewest)

    def narrow(self) -> "Case":
        """A quick variant, for runs that take no times."""
        return replace(self, width=min(self.width, 96))


REFERENCE = Case(MAGT_U, 64, WIDTH)
CASES = [
    *(Case(MAGT_U, U, WIDTH) for U in UTTERANCES),
    *(Case(model, L, WIDTHS[model]) for model in FRAME_MODELS for L in FRAMES),
    *(Case(PUBLISHED, lengths, WIDTHS[PUBLISHED]) for lengths in LENGTHS),
]
QUICK = list({case.model: case for case in reversed(CASES)}.values())  # the first case of each model


@lru_cache(maxsize=3)
def _build(case: Case, device: str) -> nn.Module:
    torch.manual_seed(SEED)
    with torch.device(device):
        return MAGT(case.config) if case.model == MAGT_U else MulT(case.config)


def conversations(lengths: list[int], width: int, device: str) -> tuple:
    """Random arguments of MAGT.forward, in order: features, speakers, lengths. Nothing is missing."""
    N = sum(lengths)
    features = {m: torch.randn(N, width, device=device) for m in MODALITIES}
    return features, torch.randint(1, SPEAKERS + 1, (N,), device=device), lengths


def inference(case: Case, samples: int, device: str) -> Callable[[], Tensor]:
    """A forward pass in eval and inference mode; returns the logits."""
    model, inputs = case.build(device), case.inputs(samples, device)

    @torch.inference_mode()
    def forward() -> Tensor:
        output = model.eval()(*inputs)
        return output if isinstance(model, MulT) else output.logits["text"]

    return forward


def training(case: Case, samples: int, device: str) -> Callable[[], Tensor]:
    """Forward and backward pass with dropout; returns the loss.

    Without the optimizer: its cost does not depend on the number of utterances, which differs between the cases.
    """
    model, inputs = case.build(device), case.inputs(samples, device)

    def step() -> Tensor:
        output = model.train()(*inputs)
        loss = sum(x.square().mean() for x in ([output] if isinstance(model, MulT) else output.logits.values()))
        loss.backward()
        model.zero_grad()  # frees the gradients
        return loss.detach()

    return step


# A whole step of stage 2


@dataclass(frozen=True)
class Stage2:
    """Batch and weights of Table 1. The 16 conversations have the 16 quantiles of the training set's lengths."""

    lengths: list[int]
    classes: int
    alpha: float
    beta: float


STAGE2 = {
    "IEMOCAP": Stage2([26, 27, 31, 35, 38, 42, 44, 46, 49, 52, 53, 56, 60, 62, 69, 79], 6, alpha=0.7, beta=0.8),
    "MELD": Stage2([1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 18, 21], 7, alpha=0.01, beta=0.09),
}
STAGE2_MODES = ("float32", "bfloat16", "torch.compile", "CUDA graph")  # the last two have not been measured


def stage2_step(stage: Stage2, lengths: list[int], dtype: str, device: str) -> tuple[Callable[[], Tensor], Flops]:
    """One step as stage 2 trains (MAGT, Eq. 25, clipping, AdamW), which returns the loss; FLOPs of its forward pass."""
    torch.manual_seed(SEED)
    config = FusionConfig(dict.fromkeys(MODALITIES, WIDTH), stage.classes, SPEAKERS, WIDTH, HEADS)
    model, inputs = MAGT(config).to(device), conversations(lengths, WIDTH, device)
    labels = torch.randint(0, stage.classes, (sum(lengths),), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else nullcontext():
            output = model(*inputs)
            loss = stage2_loss(output.logits, output.hidden, labels, stage.alpha, stage.beta)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, magt_flops(config, lengths)


# The encoders of stage 1, at their published sizes

ROBERTA_LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
ROBERTA_LARGE |= dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
ENCODERS = {  # name -> shape of one utterance's input
    "RoBERTa-large, 256 tokens": (256,),
    "Data2Vec-audio-base, 5 s at 16 kHz": (80_000,),
    "TimeSformer-base, 8 frames of 224 x 224": (8, 3, 224, 224),
}
ENCODER_BATCH = 4  # Table 1


def encoder(name: str, device: str) -> tuple[nn.Module, Tensor]:
    """The model with random weights, in training mode, and a batch of utterances."""
    import transformers  # slow to import

    with torch.device(device):
        if name.startswith("RoBERTa"):
            model = transformers.RobertaModel(transformers.RobertaConfig(**ROBERTA_LARGE), add_pooling_layer=False)
            inputs = torch.full((ENCODER_BATCH, *ENCODERS[name]), 5)  # any token will do
        elif name.startswith("Data2Vec"):  # without what is random in it: layer drop and SpecAugment
            config = transformers.Data2VecAudioConfig(layerdrop=0.0, apply_spec_augment=False)
            model, inputs = transformers.Data2VecAudioModel(config), torch.randn(ENCODER_BATCH, *ENCODERS[name])
        else:
            model = transformers.TimesformerModel(transformers.TimesformerConfig())
            inputs = torch.randn(ENCODER_BATCH, *ENCODERS[name])
    return model.train(), inputs


ROWS = 3 * len(CASES) + len(STAGE2) * len(DTYPES) + len(ENCODERS) * (2 if DEVICE == "cuda" else 1)  # of a complete run
