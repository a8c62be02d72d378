"""What is measured: the settings, the sizes, the inputs. How it is measured is in measure.py and modes.py; the
measuring itself in test_grid.py and test_parts.py.

Matched: MAGT and MulT with the same width D = 768, 8 heads, one layer in every encoder, inputs of width D. What differs
is the granularity: MAGT's attention runs over the U utterances of a conversation, MulT's over the L frames of an
utterance. MulT's memories get one layer here, though its authors' rule is max(layers, 3): three would count against
MulT for its depth and not for its frames. The rule's variant is counted too ("authors' memories").

As published: MulT with d = 40, 8 heads, 4 layers (memories 4), input widths 300, 74 and 35 (GloVe, COVAREP, Facet),
at the published lengths of text/audio/video: aligned 20/20/20 and 50/50/50, unaligned 50/375/500. MAGT with D = 768.

Both sides see the same S = C U = 128 utterances when FLOPs are counted. A CPU cannot time all of that: timed_samples
says how many utterances a timed call sees, and times are compared per utterance. FLOPs and bytes are proportional to
S (tested).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import transformers
from torch import Tensor, nn

from bench import lengths
from bench.gpu_encoders import ROBERTA_LARGE
from bench.measure import SEED, Flops, magt_flops, mult_flops
from bench.mult import MulT, MulTConfig
from data import MODALITIES, Batch
from fusion import MAGT, FusionConfig
from magtkd import CONFIGS, Config, make_batches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLASSES, SPEAKERS = 6, 2
WIDTH, HEADS = 768, 8

SAMPLES = 128  # S, utterances on both sides
UTTERANCES = (8, 16, 32, 64, 128)  # U
FRAMES = (8, 16, 32, 64, 128, 256, 512)  # L, the same for the three modalities
PUBLISHED_FRAMES = {"aligned, IEMOCAP": (20, 20, 20), "aligned, MOSI": (50, 50, 50), "unaligned, MOSI": (50, 375, 500)}
NARROW, NARROW_LENGTH = (96, 192, 384), 64  # widths below 768, for the exponent in D, at U = L = 64

MAGT_, MATCHED, MEMORIES, PUBLISHED = "MAGT", "MulT matched", "MulT matched, authors' memories", "MulT as published"
INPUT_WIDTHS = {PUBLISHED: (300, 74, 35)}  # the others: the width of the model
# FLOPs that a timed call may take. d = 40 reaches a fifth of the FLOP/s of D = 768, so it gets fewer.
FORWARD_FLOPS = {
    "cpu": {MAGT_: 3.5e10, MATCHED: 3.5e10, PUBLISHED: 7e9},
    "cuda": {MAGT_: 7e12, MATCHED: 7e12, PUBLISHED: 1.4e12},
}


@dataclass(frozen=True)
class Case:
    """A model and the length of its sequences: utterances per conversation (MAGT), frames (MulT; text/audio/video)."""

    variant: str
    length: int | tuple[int, int, int]
    width: int = WIDTH

    def __str__(self) -> str:
        text = "/".join(map(str, self.length)) if isinstance(self.length, tuple) else self.length
        return f"{self.variant} {'U' if self.variant == MAGT_ else 'L'}={text} D={self.width}"

    @property
    def frames(self) -> dict[str, int]:
        return dict(zip(MODALITIES, self.length if isinstance(self.length, tuple) else (self.length,) * 3))

    @property
    def config(self) -> FusionConfig | MulTConfig:
        widths = dict(zip(MODALITIES, INPUT_WIDTHS.get(self.variant, (self.width,) * 3)))
        if self.variant == MAGT_:
            return FusionConfig(widths, CLASSES, SPEAKERS, self.width, HEADS)
        if self.variant == PUBLISHED:
            return MulTConfig(widths, CLASSES, self.width)
        memories = {MATCHED: 1, MEMORIES: None}[self.variant]
        return MulTConfig(widths, CLASSES, self.width, HEADS, layers=1, memory_layers=memories)

    def flops(self, samples: int) -> Flops:
        """By the closed form."""
        if self.variant == MAGT_:
            return magt_flops(self.config, [self.length] * (samples // self.length))
        return mult_flops(self.config, samples, self.frames)

    def model(self, device: str) -> nn.Module:
        """In training mode; on the meta device without weights, else from the seed."""
        return _model(self.variant, self.width, device)

    def inputs(self, samples: int, device: str) -> tuple:
        """What the model is called with: `samples` utterances, all of the case's length."""
        if self.variant == MAGT_:
            return conversations([self.length] * (samples // self.length), self.width, device)
        frames, _ = utterances([self.frames] * samples, self.config.widths, device)
        return (frames,)  # no masks, since there is no padding

    def timed_samples(self) -> int:
        """How many utterances a timed call sees: S, halved until its FLOPs fit."""
        samples, fewest = SAMPLES, self.length if self.variant == MAGT_ else 1
        while samples > fewest and self.flops(samples).total > FORWARD_FLOPS[DEVICE][self.variant]:
            samples //= 2
        return samples


TIMED = (
    [Case(MAGT_, U) for U in UTTERANCES]
    + [Case(MATCHED, L) for L in FRAMES]
    + [Case(PUBLISHED, L, width=40) for L in (*FRAMES, *PUBLISHED_FRAMES.values())]
)
COUNTED = (
    TIMED
    + [Case(variant, NARROW_LENGTH, width) for variant in (MAGT_, MATCHED) for width in NARROW]
    + [Case(MEMORIES, NARROW_LENGTH, NARROW[0])]
)


@lru_cache(maxsize=2)  # one with weights and one without: the matched MulT has 170 M parameters
def _model(variant: str, width: int, device: str) -> nn.Module:
    torch.manual_seed(SEED)
    config = Case(variant, length=1, width=width).config  # no weight depends on the length
    with torch.device(device):
        return MAGT(config) if variant == MAGT_ else MulT(config)


def conversations(lengths: list[int], width: int, device: str) -> tuple:
    """Random conversations of `lengths` utterances, nothing missing: what MAGT.forward takes, in order."""
    N = sum(lengths)
    features = {m: torch.randn(N, width, device=device) for m in MODALITIES}
    return features, torch.randint(1, SPEAKERS + 1, (N,), device=device), lengths, {}


def utterances(frames: list[dict[str, int]], widths: dict[str, int], device: str) -> tuple[dict, dict]:
    """Random frames and masks of utterances, padded to the longest: what MulT.forward takes."""
    masks = {m: _mask([utterance[m] for utterance in frames], device) for m in widths}
    return {m: torch.randn(*masks[m].shape, width, device=device) for m, width in widths.items()}, masks


def _mask(lengths: list[int], device: str) -> Tensor:
    """[B, longest], True where there is something, then False."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]


@dataclass(frozen=True)
class Corpus:
    """A corpus's training conversations by their lengths, and the paper's settings for it (Table 1)."""

    lengths: tuple[int, ...]
    classes: int
    config: Config

    def fusion(self, width: int = WIDTH) -> FusionConfig:
        return FusionConfig(dict.fromkeys(MODALITIES, width), self.classes, SPEAKERS, width, HEADS)

    def epoch(self) -> list[list[int]]:
        """The lengths of the conversations in each batch of an epoch; at random, as in stage 2, but from a seed."""
        torch.manual_seed(SEED)
        batches = make_batches({str(i): 1 for i in range(len(self.lengths))}, self.config.stage2_batch)
        return [[self.lengths[int(name)] for name in batch] for batch in batches]

    def typical_batch(self) -> list[int]:
        """The batch of the epoch whose padded size is the median (the upper one of two)."""
        by_size = sorted(self.epoch(), key=lambda batch: len(batch) * max(batch))
        return by_size[len(by_size) // 2]

    def batch(self, lengths: list[int], device: str) -> Batch:
        """Random features and labels for conversations of `lengths` utterances: a batch of stage 2."""
        labels = torch.randint(0, self.classes, (sum(lengths),), device=device)
        return Batch(conversations(lengths, WIDTH, device), labels, rows={})  # no rows: nothing is missing


CORPORA = {
    "IEMOCAP": Corpus(tuple(lengths.IEMOCAP["train"]), 6, CONFIGS["iemocap"]),
    "MELD": Corpus(tuple(lengths.MELD["train"]), 7, CONFIGS["meld"]),
}

# The encoders of stage 1, at their published sizes

ENCODERS = {  # name: (how to build it with random weights, shape of one utterance's input)
    "RoBERTa-large, 256 tokens": (
        lambda: transformers.RobertaModel(transformers.RobertaConfig(**ROBERTA_LARGE), add_pooling_layer=False),
        (256,),
    ),
    "Data2Vec-audio-base, 5 s at 16 kHz": (
        # Without what is random in it: left-out layers and masked frames.
        lambda: transformers.Data2VecAudioModel(
            transformers.Data2VecAudioConfig(layerdrop=0.0, apply_spec_augment=False)
        ),
        (80_000,),
    ),
    "TimeSformer-base, 8 frames of 224 x 224": (
        lambda: transformers.TimesformerModel(transformers.TimesformerConfig()),
        (8, 3, 224, 224),
    ),
}


def encoder(name: str, device: str) -> tuple[nn.Module, Tensor]:
    """The model, in training mode, and a batch of 4 utterances (Table 1)."""
    build, shape = ENCODERS[name]
    with torch.device(device):
        inputs = torch.full((4, *shape), 5) if "tokens" in name else torch.randn(4, *shape)  # any token will do
        return build().train(), inputs
