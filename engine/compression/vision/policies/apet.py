"""ApET: keep the tokens that a few others cannot make up for (Ma et al., 2026, arXiv:2602.19870).

    basis        = `basis` tokens by farthest-point sampling
    error(token) = || token - its best combination of the basis ||,  by least squares with a ridge of 1e-5
    kept         = the basis and the tokens with the largest errors
    merged(t)    = mean of such a token t and of those dropped whose nearest it is, by cosine

Done twice: before the language model, where tokens are what the tower's last layer puts out and what the model reads is
averaged; and before layer 16 of 32, where both are hidden states and a third of `keep` stays (the paper's 96 and 32 of
576 tokens).

Where we depart: sampling begins with the token that is farthest from the mean, in the reference with one at random.
There the basis overwrites the kept tokens of least error, here it stays where it is. Of a small `keep` the basis is no
more than half. Before the language model each crop has its share of `keep`, as in the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.depths import Layers, at_depth
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, Choice, LayerView, View, kept
from winnow.engine.compression.vision.ranking import absorbed, rest, shared_out, top, unit

if TYPE_CHECKING:
    from torch import Tensor


class ApET:
    """Keep the tokens that are approximated worst by a few others, and merge the rest into them."""

    signals = frozenset({VisionSignal.HIDDEN, VisionSignal.EMBEDDINGS})
    reads_text = False
    kinds = ANY_KIND

    truncates = False

    class Params(PolicyParams):
        basis: int = Field(10, ge=1, le=256, description="tokens that the others are approximated by")
        layers: Annotated[list[int], Layers(1, 1)] | None = Field(
            None, description="before which layer it is done again; at 16/32 of the depth if unset"
        )

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        import torch

        patches = image.patches
        states = image.signals.hidden(-1)[patches]
        merged = image.embeddings[patches]
        chosen = []
        for crop, part in shared_out(image, keep):
            if part > 0:
                places, condensed = _condensed(states[crop], merged[crop], part, params.basis)
                merged[crop[places]] = condensed
                chosen.append(crop[places])
        index = torch.cat(chosen)
        return kept(image, patches[index], merged[index])

    def layers(self, params: Params, depth: int) -> list[int]:
        return at_depth([16], depth, params.layers)

    def choose(self, view: LayerView, params: Params) -> Choice:
        states = view.hidden.cpu()
        places, condensed = _condensed(states, states, min(max(1, round(view.keep / 3)), len(states)), params.basis)
        rows, order = places.sort()
        return Choice(rows.to(view.hidden.device), condensed[order].to(view.hidden.device))


def _condensed(x: Tensor, merged: Tensor, count: int, most: int) -> tuple[Tensor, Tensor]:
    """`count` of the tokens with the states x [n, d], of which the basis are `most`, at most.

    Returns
        chosen [count] int64, and what stands there [count, m]: means of rows of merged [n, m]
    """
    import torch

    basis = farthest_points(x, min(most, max(1, count // 2)))
    errors = approximation_errors(x, basis).index_fill(0, basis, -1.0)
    worst = top(errors, count - len(basis))
    chosen = torch.cat((basis, worst))
    others = rest(len(x), chosen)
    condensed = merged[chosen]
    if len(worst) and len(others):
        rows = torch.cat((worst, others))
        condensed[len(basis) :] = absorbed(merged[rows], unit(x[rows]), torch.arange(len(worst)))
    return chosen, condensed


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
    # Where the ridge is lost beside tokens that are long and equal, nothing is raised: all tokens are in the basis.
    weights = torch.linalg.solve_ex(gram, seeds @ x.double().T).result.T
    return (x.double() - weights @ seeds).norm(dim=1).float().nan_to_num(0.0)
