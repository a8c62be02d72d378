"""What is measured: the settings, the sizes, the inputs. How, is in measure.py; the measuring itself in test_*.py.

Matched: MAGT and MulT with the same width D = 768, 8 heads, one layer in every encoder, input vectors of width D.
What differs is the granularity: MAGT's attention runs over the U utterances of a conversation, MulT's over the L
frames of an utterance. MulT's memories get one layer here, though its authors' rule is max(layers, 3): three would
count against MulT for its depth and not for its frames. The rule's variant is counted too ("authors' memories").

As published: MulT with d = 40, 8 heads, 4 layers (memories 4), input widths 300, 74 and 35 (GloVe, COVAREP, Facet),
at the published lengths of text/audio/video: aligned 20/20/20 and 50/50/50, unaligned 50/375/500. MAGT with D = 768.

Both sides see the same S = C U = 128 utterances when FLOPs are counted. A CPU cannot time all of that: timed_samples
says how many utterances a timed call sees, and times are compared per utterance. FLOPs and bytes are proportional to
S (tested).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from bench import lengths
from bench.measure import SEED, Flops, magt_flops, mult_flops
from bench.mult import MulT, MulTConfig
from fusion import MAGT, FusionConfig
from training import make_batches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODALITIES = ("text", "audio", "video")
CLASSES, SPEAKERS = 6, 2
WIDTH, HEADS = 768, 8

SAMPLES = 128  # S, utterances on both sides
UTTERANCES = (8, 16, 32, 64, 128)  # U
FRAMES = (8, 16, 32, 64, 128, 256, 512)  # L, the same for the three modalities
PUBLISHED_FRAMES = {"aligned, IEMOCAP": (20, 20, 20), "aligned, MOSI": (50, 50, 50), "unaligned, MOSI": (50, 375, 500)}
NARROW, NARROW_LENGTH = (96, 192, 384), 64  # widths below 768, for the exponent in D, at U = L = 64

MAGT_, MATCHED, MEMORIES, PUBLISHED = "MAGT", "MulT matched", "MulT matched, authors' memories", "MulT as published"
INPUT_WIDTHS = {PUBLISHED: (300, 74, 35)}  # the others: the width of the model
# What a timed call may cost. d = 40 reaches a fifth of the FLOP/s of D = 768, so it gets fewer.
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
            return magt_flops(self.config, samples // self.length, self.length)
        return mult_flops(self.config, samples, self.frames)

    def model(self, device: str) -> nn.Module:
        """In training mode; on the meta device without weights, else from the seed."""
        return _model(self.variant, self.width, device)

    def inputs(self, samples: int, device: str) -> tuple:
        """What the model is called with: `samples` utterances, no padding."""
        if self.variant == MAGT_:
            return conversations([self.length] * (samples // self.length), self.width, device)
        return utterances([self.frames] * samples, self.config.widths, device)

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


def conversations(lengths: list[int], width: int, device: str, padded: bool = False) -> tuple:
    """Random conversations padded to the longest, nothing missing: features, speakers, mask, present and places, what
    MAGT.forward takes.

    padded: all places count as utterances, so that the linear layers, too, work on padding, for comparison.
    """
    B, U = len(lengths), max(lengths)
    mask = _mask(lengths, device)
    places = torch.arange(B * U) if padded else _mask(lengths, "cpu").flatten().nonzero().squeeze(1)
    features = {m: torch.randn(B, U, width, device=device) for m in MODALITIES}
    speakers = torch.randint(0, SPEAKERS, (B, U), device=device).masked_fill(~mask, -1)
    return features, speakers, mask, dict.fromkeys(MODALITIES, mask), places.to(device)


def utterances(frames: list[dict[str, int]], widths: dict[str, int], device: str) -> tuple[dict, dict]:
    """Random frames and masks of utterances padded to the longest: what MulT.forward takes."""
    masks = {m: _mask([utterance[m] for utterance in frames], device) for m in widths}
    return {m: torch.randn(*masks[m].shape, width, device=device) for m, width in widths.items()}, masks


def _mask(lengths: list[int], device: str) -> Tensor:
    """[B, longest], True where there is something, then False."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]


@dataclass(frozen=True)
class Corpus:
    """The lengths of a corpus's training conversations, and the paper's settings for it (Table 1)."""

    lengths: tuple[int, ...]
    classes: int
    alpha: float
    beta: float

    @property
    def config(self) -> FusionConfig:
        return FusionConfig(dict.fromkeys(MODALITIES, WIDTH), self.classes, SPEAKERS)

    def batches(self, size: int = 16, similar: bool = False) -> list[list[int]]:
        """One epoch in batches of `size` conversations, at random from the seed, or of similar length as in stage 2."""
        torch.manual_seed(SEED)
        batches = make_batches(self.lengths if similar else [1] * len(self.lengths), size)
        return [[self.lengths[i] for i in batch] for batch in batches]

    def typical_batch(self, size: int = 16, similar: bool = False) -> list[int]:
        """The batch of the epoch whose padded size is the median (the upper one of two)."""
        by_size = sorted(self.batches(size, similar), key=lambda batch: len(batch) * max(batch))
        return by_size[len(by_size) // 2]

    def padded_flops(self, batches: list[list[int]]) -> Flops:
        """Each batch padded to its longest conversation for attention; the linear layers work without padding."""
        return _sum(magt_flops(self.config, len(batch), max(batch), sum(batch)) for batch in batches)

    def valid_flops(self, batches: list[list[int]]) -> Flops:
        """Each conversation by itself, without padding."""
        return _sum(magt_flops(self.config, 1, length) for batch in batches for length in batch)


def _sum(counts: Iterable[Flops]) -> Flops:
    return Flops(*map(sum, zip(*counts)))


CORPORA = {
    "IEMOCAP (reconstructed lengths)": Corpus(tuple(lengths.IEMOCAP_RECONSTRUCTED["train"]), 6, 0.7, 0.8),
    "MELD": Corpus(tuple(lengths.MELD["train"]), 7, 0.01, 0.09),
}
