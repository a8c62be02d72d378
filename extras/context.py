"""Context, a baseline of our own: what does the conversation bring without anchors and gates?"""

import torch
from torch import Tensor, nn

from fusion import (
    TEXT,
    Block,
    FusionConfig,
    FusionOutput,
    input_layers,
    positions_and_speakers,
    read_inputs,
    speaker_embedding,
)


class Context(nn.Module):
    """One transformer block over the conversation, each utterance's features put side by side.

    The same inputs, positions, speakers and block as MAGT's, and neither anchors nor gates. Concat sees one utterance,
    MAGT the conversation: Context tells what the conversation brings from what anchors and gates bring. Input and
    output as MAGT's, all of it under "text".
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
        parts = read_inputs(self.input, self.config, features, speakers, lengths, present)
        tags = positions_and_speakers(self.speaker, speakers, lengths, [0] * len(lengths))
        h = self.merge(torch.cat(list(parts.values()), dim=-1)) + tags  # [N, D]
        x = self.block(h, h, lengths)
        return FusionOutput({TEXT: self.classifier(x)}, {TEXT: x})
