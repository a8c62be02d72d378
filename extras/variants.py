"""Other models and losses of stage 2, to compare the paper's with: Context, and the authors' released code.

Context is a baseline of this project: one transformer block over the conversation, neither anchors nor gates.
`Released` lists what the authors' code does differently from the paper in stage 2; each field is a row of
docs/differences.md, and the defaults are the paper. `--preset released` switches all of them on. No line of the
authors' code is used here.
"""

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losses
from fusion import (
    MAGT,
    TEXT,
    Anchor,
    Block,
    FusionConfig,
    FusionOutput,
    input_layers,
    positions_and_speakers,
    read_inputs,
    speaker_embedding,
)


class Context(nn.Module):
    """One transformer block over the conversation, with each utterance's features side by side.

    The same inputs, positions, speakers and block as MAGT's. Concat sees one utterance, MAGT the conversation: Context
    separates what the conversation adds from what anchors and gates add. Output under "text", no gates.
    """

    def __init__(self, config: FusionConfig):
        super().__init__()
        self.config = config
        self.input = input_layers(config)
        self.speaker = speaker_embedding(config)
        self.merge = nn.Linear(len(config.widths) * config.width, config.width)
        self.block = Block(config)
        self.classifier = nn.Linear(config.width, config.num_classes)

    def forward(self, features: dict[str, Tensor], speakers, lengths: list[int], present=None) -> FusionOutput:
        """See MAGT.forward."""
        parts = read_inputs(self.input, self.config, features, speakers, lengths, present or {})
        h = self.merge(torch.cat(list(parts.values()), dim=-1))  # [N, D]
        h = h + positions_and_speakers(self.speaker, speakers, lengths)
        x = self.block(h, h, lengths)
        return FusionOutput({TEXT: self.classifier(x)}, {TEXT: x}, {})


@dataclass(frozen=True)
class Released:
    """The authors' differences by row of docs/differences.md. The defaults are the paper."""

    shared_text_anchor: bool = False  # row 9: the text anchor's streams share one block and one gate
    relu_gate: bool = False  # row 10: a ReLU inside the gate, which is then never below 0.5
    added_twice: bool = False  # row 11: positions and speakers are added once more to the enriched sequences
    more_dropout: bool = False  # row 13: on attention weights, and on query and source inputs of the cross streams
    initial_weights: bool = False  # row 13: Xavier for query, key and value, their biases 0, speakers with std 0.1
    branch_cross_entropy: bool = False  # row 14: a cross entropy on the audio and the video branch in their KD terms
    feature_loss: bool = True  # row 14: L_f in stage 2
    detach_teacher: bool = True  # row 15
    schedule: bool = False  # row 17: warm-up N, total N x epochs, N training conversations, one step per batch
    input_norm: bool = True  # row 22
    optimizer: bool = False  # row 23: weight decay 1e-6, norm of the gradient clipped at 10

    def model(self, config: FusionConfig) -> MAGT:
        """MAGT with these differences, from MAGT's own initial weights for the same seed."""
        switches = {name: getattr(self, name) for name in ("shared_text_anchor", "relu_gate", "added_twice")}
        switches |= {"more_dropout": self.more_dropout, "initial_weights": self.initial_weights}
        config = replace(config, input_norm=config.input_norm and self.input_norm)
        return ReleasedMAGT(ReleasedConfig(**asdict(config), **switches))

    def loss(self, logits, hidden, labels, alpha, beta, rows=None, weight=None) -> dict[str, Tensor]:
        """losses.stage2_loss with rows 14 and 15."""
        terms = losses.stage2_loss(logits, hidden, labels, alpha, beta, rows, weight, self.detach_teacher)
        for m in ("audio", "video"):
            at = (rows or {}).get(m, slice(None))
            if not self.feature_loss:
                terms[f"kd_{m}"] = terms[f"l_s_{m}"]
            if self.branch_cross_entropy and m in logits and len(labels[at]):
                terms[f"kd_{m}"] = terms[f"kd_{m}"] + losses.cross_entropy(logits[m][at], labels[at], weight)
        return terms | {"loss": terms["l_ce"] + alpha * terms["kd_audio"] + beta * terms["kd_video"]}

    def recipe(self, recipe, examples: int):
        """A recipe of magtkd.py with rows 17 and 23. examples: N, training conversations."""
        if self.schedule:
            recipe = replace(recipe, warmup_steps=examples, total_steps=examples * recipe.epochs)
        return replace(recipe, weight_decay=1e-6, clip=10.0) if self.optimizer else recipe


def released(corpus: str) -> Released:
    """All differences, as the authors train on this corpus: for MELD they leave L_f out of stage 2."""
    switches = ("shared_text_anchor", "relu_gate", "added_twice", "more_dropout", "initial_weights")
    on = dict.fromkeys((*switches, "branch_cross_entropy", "schedule", "optimizer"), True)
    return Released(**on, feature_loss=corpus != "meld", detach_teacher=False, input_norm=False)


@dataclass(frozen=True)
class ReleasedConfig(FusionConfig):
    """FusionConfig with the switches of `Released` that belong to the model."""

    shared_text_anchor: bool = False
    relu_gate: bool = False
    added_twice: bool = False
    more_dropout: bool = False
    initial_weights: bool = False


class ReleasedBlock(Block):
    def attention_dropout(self) -> float:
        return self.config.dropout if self.config.more_dropout and self.training else 0.0


class ReleasedAnchor(Anchor):
    block_class = ReleasedBlock

    def __init__(self, config: ReleasedConfig, name: str):
        super().__init__(config, name)
        self.config = config
        if config.shared_text_anchor and name == TEXT:  # the same modules under every key
            for modules in (self.block, self.gate):
                first = next(iter(modules.values()))
                for source in modules:
                    modules[source] = first

    def stream(self, source: str, anchor: Tensor, x: Tensor, lengths: list[int], present: Tensor | None) -> Tensor:
        if self.config.more_dropout and source != self.name:  # the residual connection starts from the dropped query
            anchor = F.dropout(anchor, self.config.dropout, self.training)
            x = F.dropout(x, self.config.dropout, self.training)
        return super().stream(source, anchor, x, lengths, present)

    def alpha(self, source: str, h: Tensor) -> Tensor:
        gate = self.gate[source](h)
        return torch.sigmoid(F.relu(gate) if self.config.relu_gate else gate)


class ReleasedMAGT(MAGT):
    anchor_class = ReleasedAnchor

    def __init__(self, config: ReleasedConfig):
        super().__init__(config)
        if config.initial_weights:
            nn.init.normal_(self.speaker.weight[1:], std=0.1)
            for block in (block for anchor in self.anchor.values() for block in anchor.block.values()):
                for weight in (block.query.weight, *block.key_value.weight.chunk(2)):
                    nn.init.xavier_uniform_(weight)
                for bias in (block.query.bias, block.key_value.bias):
                    nn.init.zeros_(bias)

    def enriched(self, hidden: dict[str, Tensor], speakers: Tensor, lengths: list[int]) -> dict[str, Tensor]:
        if not self.config.added_twice:
            return hidden
        added = positions_and_speakers(self.speaker, speakers, lengths)
        return {m: x + added for m, x in hidden.items()}


CLASSES = {"Context": (Context, FusionConfig), "ReleasedMAGT": (ReleasedMAGT, ReleasedConfig)}  # for magtkd.load_fusion
