"""PiToMe: merge within the vision tower what there is much of (Tran et al., 2024, arXiv:2405.16148).

    energy(i) = mean over j of f(cos(key(i), key(j)) - margin),  f(x) = x if x >= 0, else alpha * (exp(x) - 1)
    margin    = `margin` * (1 - layer / layers)

A token of much energy has many that are like it: it is background. To lose r tokens, the 2 r of most energy are dealt,
in that order, into two sets, and each of the first merges with the most similar of the second. All others are
protected. Every layer takes the same share of its tokens away.

Where we depart:
- The energy is that of the reference's vision models. The paper's equation 4 counts the cosine itself from the margin
  on, not what it is beyond the margin, so that it has a step there. The Gaussian of the reference's language models, of
  which it says that it does better than the equation, is not here.
- In some models the reference has plain ToMe in the lower half of the layers; here, as in the paper, the rule holds in
  all of them.
- A layer that has to lose more than half of its tokens matches a second time.
"""

from __future__ import annotations

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.encoder import LayerTokens, Reduction, geometric_counts
from winnow.engine.compression.vision.features import VisionSignal
from winnow.engine.compression.vision.matching import partners, unit_keys
from winnow.engine.compression.vision.policy import IMAGES


class PiToMe:
    """Merge tokens of the vision tower that have many like them, and protect the others."""

    signals = frozenset({VisionSignal.KEYS})
    reads_text = False
    kinds = IMAGES

    class Params(PolicyParams):
        margin: float = Field(
            0.9, ge=0, le=1, allow_inf_nan=False, description="cosine from which tokens are alike, in the lowest layer"
        )
        alpha: float = Field(
            1.0, ge=0, le=10, allow_inf_nan=False, description="how much those that are not alike count against"
        )

    def counts(self, layers: int, patches: int, keep: int, params: Params) -> list[int]:
        return geometric_counts(layers, patches, keep)

    def reduce(self, tokens: LayerTokens, count: int, params: Params) -> Reduction:
        from torch.nn.functional import elu

        units = unit_keys(tokens)
        margin = params.margin * (1 - tokens.layer / tokens.layers)
        similarity = (units @ units.T).fill_diagonal_(1)  # rounding is not to tell two tokens apart
        energy = elu(similarity - margin, params.alpha).mean(1)
        drop = min(len(tokens) - count, len(tokens) // 2)
        much = energy.sort(descending=True, stable=True).indices[: 2 * drop]
        sources, targets = much[::2], much[1::2]
        into = partners(units, sources, targets)[0] if drop else targets
        return Reduction.merging(tokens.without(sources), sources, into, len(tokens))
