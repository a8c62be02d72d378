"""MAGT with a bias to the own utterance: one learned number per head (`--anatomy`, docs/anatomy.md).

In a stream between two modalities the anchor's utterances ask and the source's answer. Nothing in Eq. 19 and 20 tells
an utterance which of the source's rows is its own: attention has to learn it from the positions (Eq. 15, 16), out of as
many conversations as there are. Here a number is added to the attention score between an utterance and its own row, in
the streams between different modalities alone. It begins at `own`, and is learned. At 0 the model is the paper's.

Not in the paper, and not its default. Not here: what it is worth (anatomy.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion import MAGT, Block, FusionConfig

OWN = 6.0  # where the number begins. Of 20 scores that are otherwise equal, e^6 gives the own row 95 % of the attention


@dataclass(frozen=True)
class OwnConfig(FusionConfig):
    """FusionConfig with the number that the bias begins at."""

    own: float = OWN


class OwnBlock(Block):
    """A stream whose utterances know their own row."""

    def __init__(self, config: OwnConfig):
        super().__init__(config)
        self.own = nn.Parameter(torch.full((config.heads,), float(config.own)))

    def attend_one(self, q: Tensor, k: Tensor, v: Tensor, readable: Tensor | None) -> Tensor:
        """As Block.attend_one, with self.own added to the score of row T - U + u for utterance u.

        q [U, D], k and v [T, D], T = U without a past; readable [T]. Returns [U, D].
        """
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, U, D/heads]
        U, T = q.shape[2], k.shape[2]
        row = torch.arange(T, device=q.device)
        own_row = torch.arange(T - U, T, device=q.device)[:, None]  # [U, 1]: after the past
        may_read = row <= own_row if self.causal else (row >= 0).expand(U, T)  # [U, T]
        if readable is not None:
            may_read = may_read & readable
        # A row of -inf alone gives NaN. An utterance that may read nothing reads all, and then the answer is set to 0.
        reads = may_read.any(dim=1, keepdim=True)  # [U, 1]
        scores = self.own[:, None, None] * (row == own_row)  # [heads, U, T]
        scores = scores.masked_fill(~may_read & reads, -torch.inf)
        answer = F.scaled_dot_product_attention(q, k, v, scores[None].to(q.dtype))
        return answer[0].masked_fill(~reads, 0.0).transpose(0, 1).flatten(1)


class OwnMAGT(MAGT):
    """MAGT with an OwnBlock in each stream between two modalities. Its other weights begin as MAGT's would."""

    def __init__(self, config: OwnConfig):
        super().__init__(config)
        for name, anchor in self.anchor.items():
            for source in [source for source in anchor.block if source != name]:
                block = OwnBlock(config)
                block.load_state_dict({**anchor.block[source].state_dict(), "own": block.own})
                anchor.block[source] = block


def own_magt(own: float = OWN) -> Callable[[FusionConfig], OwnMAGT]:
    """A model for magtkd.Method: OwnMAGT, its number beginning at `own`."""
    return lambda config: OwnMAGT(OwnConfig(**vars(config), own=own))
