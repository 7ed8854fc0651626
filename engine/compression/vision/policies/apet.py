"""ApET: keep the tokens that a few others cannot make up for (Ma et al., 2026, arXiv:2602.19870).

    basis        = `basis` tokens by farthest-point sampling
    error(token) = || token - its best combination of the basis ||,  by least squares with a ridge of 1e-5
    kept         = the basis and the tokens with the largest errors
    merged(t)    = mean of such a token t and of those dropped whose nearest it is, by cosine

Tokens are what the tower's last layer puts out; what the language model reads is averaged.

Where we depart: sampling begins with the token that is farthest from the mean, in the reference with one at random.
There the basis overwrites the kept tokens of least error, here it stays where it is. Of a small `keep` the basis is no
more than half. Each crop has its share of `keep`, as in the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, View, kept
from winnow.engine.compression.vision.ranking import crops, means, rest, share, top, unit

if TYPE_CHECKING:
    from torch import Tensor


class ApET:
    """Keep the tokens that are approximated worst by a few others, and merge the rest into them."""

    signals = frozenset({VisionSignal.HIDDEN, VisionSignal.EMBEDDINGS})
    reads_text = False
    kinds = ANY_KIND

    class Params(PolicyParams):
        basis: int = Field(10, ge=1, le=256, description="tokens that the others are approximated by")

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        import torch

        patches = image.patches
        states = image.signals.hidden(-1)[patches]
        merged = image.embeddings[patches]
        chosen = []
        members = crops(image)
        sizes = [len(crop) for crop in members]
        for crop, part in zip(members, share(keep, sizes, sizes), strict=True):
            if part == 0:
                continue
            x = states[crop]
            basis = farthest_points(x, min(params.basis, max(1, part // 2)))
            errors = approximation_errors(x, basis).index_fill(0, basis, -1.0)
            worst = top(errors, part - len(basis))
            others = rest(len(crop), torch.cat((basis, worst)))
            if len(worst) and len(others):
                units = unit(x)
                group = torch.cat(((units[others] @ units[worst].T).argmax(1), torch.arange(len(worst))))
                merged[crop[worst]] = means(merged[crop[torch.cat((others, worst))]], group, len(worst))
            chosen += [crop[basis], crop[worst]]
        index = torch.cat(chosen)
        return kept(image, patches[index], merged[index])


def farthest_points(x: Tensor, count: int) -> Tensor:
    """[count] int64: rows of x [n, d], each the farthest from those before it; the first from the mean."""
    import torch

    distance = (x - x.mean(0)).square().sum(1)
    is_chosen = torch.zeros(len(x), dtype=torch.bool)
    points: list[int] = []
    for _ in range(count):
        points.append(int(distance.masked_fill(is_chosen, -1.0).argmax()))
        is_chosen[points[-1]] = True
        to_point = (x - x[points[-1]]).square().sum(1)
        distance = to_point if len(points) == 1 else torch.minimum(distance, to_point)
    return torch.tensor(points)


def approximation_errors(x: Tensor, basis: Tensor) -> Tensor:
    """[n] what is left of each row of x [n, d] without its best combination of the rows `basis`."""
    import torch

    seeds = x[basis].double()
    gram = seeds @ seeds.T + 1e-5 * torch.eye(len(basis), dtype=torch.float64)
    weights = torch.linalg.solve(gram, seeds @ x.double().T).T
    return (x.double() - weights @ seeds).norm(dim=1).float()
