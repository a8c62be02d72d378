"""What the authors' released code does differently from the paper in stage 2: `--preset released`.

docs/differences.md has the rows by number. The models here are subclasses with one switch per row; with all switches
off they are the paper's. No line of the authors' code is used.
"""

import dataclasses
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

import losses
from data import Batch
from extras.context import Context
from extras.own_utterance import OwnConfig, OwnMAGT
from fusion import MAGT, TEXT, Anchor, Concat, FusionConfig, FusionOutput
from magtkd import CONFIGS, Config, Method, fusion_losses


@dataclass(frozen=True)
class ReleasedConfig(FusionConfig):
    """FusionConfig with the authors' switches."""

    shared_text_anchor: bool = False  # row 9: the text anchor's streams share one block and one gate
    relu_gate: bool = False  # row 10: a ReLU inside the gate, which is then never below 0.5
    tags_twice: bool = False  # row 11: positions and speakers are added once more to the enriched sequences


class ReleasedAnchor(Anchor):
    def __init__(self, config: ReleasedConfig, name: str):
        super().__init__(config, name)
        self.relu_gate = config.relu_gate
        if config.shared_text_anchor and name == TEXT:  # the same modules under every key
            for modules in (self.block, self.gate):
                first = next(iter(modules.values()))
                for source in modules:
                    modules[source] = first

    def alpha(self, source: str, h: Tensor) -> Tensor:
        gate = self.gate[source](h)
        return (F.relu(gate) if self.relu_gate else gate).sigmoid()


def swap_anchors(model: MAGT, anchor: type[Anchor]) -> MAGT:
    """The model with anchors of another class, which begin with MAGT's weights wherever name and shape agree.

    Trained with one seed, it then differs from MAGT by its class and not by the luck of another draw.
    """
    drawn = model.anchor.state_dict()
    model.anchor = nn.ModuleDict({m: anchor(model.config, m) for m in model.config.widths})
    shapes = {name: x.shape for name, x in model.anchor.state_dict().items()}
    kept = {name: x for name, x in drawn.items() if shapes.get(name) == x.shape}
    model.anchor.load_state_dict(kept, strict=False)
    return model


class ReleasedMAGT(MAGT):
    def __init__(self, config: ReleasedConfig):
        super().__init__(config)
        swap_anchors(self, ReleasedAnchor)

    def forward(self, features, speakers, lengths, present=None, past=None) -> FusionOutput:
        """See MAGT.forward."""
        h, tags = self.tag(features, speakers, lengths, present, past)
        present = present or {}
        hidden = {m: self.anchor[m](h[m], h, lengths, present, past) for m in h if m != TEXT}
        enriched = {m: x + tags for m, x in hidden.items()} if self.config.tags_twice else hidden
        hidden[TEXT] = self.anchor[TEXT](h[TEXT], {**enriched, TEXT: h[TEXT]}, lengths, present, past)
        return self.answer(hidden, lengths, past)


@dataclass(frozen=True)
class Differences:
    """Rows 9, 10, 11, 14, 15, 17 and 22, all as the paper has them."""

    shared_text_anchor: bool = False
    relu_gate: bool = False
    tags_twice: bool = False
    branch_cross_entropy: bool = False  # row 14: a cross entropy on the audio and the video branch, in their KD terms
    feature_loss: bool = True  # row 14: L_f in stage 2
    detach_teacher: bool = True  # row 15
    warmup: float = 0.1  # row 17: share of the optimiser steps
    input_norm: bool = True  # row 22

    def method(self) -> Method:
        """Stage 2 with these differences."""

        def model(config: FusionConfig) -> MAGT:
            switches = {name: getattr(self, name) for name in ("shared_text_anchor", "relu_gate", "tags_twice")}
            return ReleasedMAGT(ReleasedConfig(**vars(config), **switches))

        def terms(out: FusionOutput, batch: Batch, config: Config, weight: Tensor | None = None) -> dict[str, Tensor]:
            return released_losses(self, out, batch, config, weight)

        return Method({"Concat": Concat, "MAGT": model}, terms, self.warmup, self.input_norm)


def released_losses(
    differences: Differences, out: FusionOutput, batch: Batch, config: Config, weight: Tensor | None
) -> dict[str, Tensor]:
    """magtkd.fusion_losses with rows 14 and 15."""
    terms = fusion_losses(out, batch, config, weight, differences.detach_teacher)
    for m in ("audio", "video"):
        if not differences.feature_loss:
            terms[f"kd_{m}"] = terms[f"l_s_{m}"]
        rows = batch.rows.get(m, slice(None))
        if differences.branch_cross_entropy and m in out.logits and len(batch.labels[rows]):
            terms[f"kd_{m}"] = terms[f"kd_{m}"] + losses.cross_entropy(out.logits[m][rows], batch.labels[rows], weight)
    terms["loss"] = losses.stage2_loss(terms["l_ce"], terms["kd_audio"], terms["kd_video"], config.alpha, config.beta)
    return terms


# What `--preset released` trains, by corpus: the authors' code for MELD leaves out L_f in stage 2.
RELEASED = {
    name: Differences(
        shared_text_anchor=True,
        relu_gate=True,
        tags_twice=True,
        branch_cross_entropy=True,
        feature_loss=name != "meld",
        detach_teacher=False,
        warmup=0.5,
        input_norm=False,
    )
    for name in CONFIGS
}


def build(name: str, fields: dict) -> nn.Module:
    """Makes any model that stage 2 saves, for magtkd.load_fusion: of the paper, of the authors, and our own."""
    if "own" in fields:
        return OwnMAGT(OwnConfig(**fields))
    if name == "MAGT" and fields.keys() & {field.name for field in dataclasses.fields(ReleasedConfig)} - {
        field.name for field in dataclasses.fields(FusionConfig)
    }:
        return ReleasedMAGT(ReleasedConfig(**fields))
    return {"Concat": Concat, "MAGT": MAGT, "Context": Context}[name](FusionConfig(**fields))
