"""What a vision policy is: it says which tokens of an image the language model reads, at one or several stages.

    pre_llm    `TokenPolicy`: between projector and language model
    encoder    within the vision tower
    llm_layer  within the language model, which forgets tokens between layers

The stages of a policy are the protocols that its class has the methods of (`STAGES`).

Like all policies these are stateless, and import torch where they compute only: the server reads their knobs. Images
never see one another, and nothing but the arguments has a part in what a policy says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal

if TYPE_CHECKING:
    from torch import Tensor

    from winnow.engine.compression.vision.encoder import LayerTokens, Reduction

Kind = Literal["image", "video"]
IMAGES: frozenset[Kind] = frozenset({"image"})
VIDEOS: frozenset[Kind] = frozenset({"video"})
ANY_KIND = IMAGES | VIDEOS


@dataclass(frozen=True)
class View:
    """What is left of an image."""

    tokens: Tensor
    """[n] int64, ascending: the placeholders that stay; a merged token stays at the place of its representative"""
    embeddings: Tensor
    """[n, hidden] float32: rows of `Features.embeddings` to the bit, unless the policy merges"""
    is_key: Tensor | None = None
    """[n] bool: tokens that the policy's own choices between layers are to spare; None: it names none"""


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """What there is of one image when the layers below a choice have read the whole prompt, and those above nothing."""

    choice: int
    """Which of the policy's choices this is, from 0"""
    tokens: Tensor
    """[n] int64, ascending: which of the image's patch tokens are there"""
    patches: int
    """How many it had before anything was pruned"""
    keep: int
    """How many of these the plan leaves in the end"""
    attention: Tensor
    """[raters, n] float32: what each rater gives to each token in the layer below, mean over the heads; a rater's sum
    over all that it sees is 1. No raters unless the policy is a `RatedPolicy`"""
    hidden: Tensor
    """[n, hidden] float32: what the layers below make of the tokens"""
    is_key: Tensor
    """[n] bool: `View.is_key`"""


@dataclass(frozen=True)
class Choice:
    """What layers above a choice read of an image."""

    rows: Tensor
    """[k] int64, ascending: which of the view's n tokens; none may be left"""
    hidden: Tensor | None = None
    """[k, hidden] float32: what stands there from now on, where the policy merges; else as it was"""


class VisionPolicy(Protocol):
    """One named method. Stateless; the registry makes one instance for the process."""

    signals: ClassVar[frozenset[VisionSignal]]
    """What it goes by beside the places of tokens"""

    reads_text: ClassVar[bool]
    """Whether it goes by the text that the image came with, too"""

    kinds: ClassVar[frozenset[Kind]]
    """What it prunes"""

    Params: ClassVar[type[PolicyParams]]
    """The method's own knobs; the request's `vision` object holds them beside the common ones"""


@runtime_checkable
class TokenPolicy(VisionPolicy, Protocol):
    """A policy that acts when the tower is done with an image and before the language model reads it."""

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Any) -> View:
        """What stays of the image.

        Args
            keep   how many of its P patch tokens: 1 <= keep < P
            text   [t, hidden] float32: embeddings of the text that it came with; empty unless `reads_text`
            seed   64 bits that stand for the image: what is drawn at random is drawn by them
            params the plan's `vision`
        Raises
            RequestError: it cannot prune an image of this layout
        """


@runtime_checkable
class EncoderPolicy(VisionPolicy, Protocol):
    """A policy that acts between the attention and the MLP of the tower's layers."""

    def counts(self, layers: int, patches: int, keep: int, params: Any) -> list[int]:
        """[layers] patch tokens after each layer that is run: never more than before, `keep` after the last one."""

    def reduce(self, tokens: LayerTokens, count: int, params: Any) -> Reduction:
        """What becomes of the n > 1 patch tokens of one image.

        Args
            count  1 <= count <= n: how many are to stay. A policy that cannot go so far in one round, because it merges
                   pairs, leaves more and is asked again. It may leave fewer if its knobs say so.
            params the plan's `vision`
        """


@runtime_checkable
class LayerPolicy(VisionPolicy, Protocol):
    """A policy by which the language model forgets tokens of an image between layers: its lanes above never hold them.

    Only tokens that stand for patches are forgotten. All layers below a choice read the whole prompt before it comes.
    """

    truncates: ClassVar[bool]
    """Whether, once the prompt is read, layers from the first that chose on forget what the last choice left out"""

    def layers(self, params: Any, depth: int) -> Sequence[int]:
        """For each of its choices, ascending, how many layers of the model's `depth` are below it: at least one, as is
        above it. Where several choices come at the same place, the last of them is made."""

    def choose(self, view: LayerView, params: Any) -> Choice:
        """What the layers above read of the image."""


@runtime_checkable
class RatedPolicy(LayerPolicy, Protocol):
    """One that goes by attention (`VisionSignal.MODEL_ATTENTION`)."""

    def raters(self, image: Tensor, text: Tensor, params: Any) -> Tensor:
        """[t] bool: whose attention `LayerView.attention` is, at least one.

        Args
            image [n, hidden] float32: embeddings of the image's patch tokens that the language model reads
            text  [t, hidden] float32: embeddings of the tokens between the image and the end of its turn, t > 0
        """


STAGES: dict[str, type] = {"pre_llm": TokenPolicy, "encoder": EncoderPolicy, "llm_layer": LayerPolicy}
"""The protocols by the stage at which policies of theirs act"""


def stages_of(policy: VisionPolicy) -> tuple[str, ...]:
    return tuple(stage for stage, protocol in STAGES.items() if isinstance(policy, protocol))


def whole(image: Features) -> View:
    """The view of an image that is not pruned."""
    tokens = image.places.new_ones(len(image.places)).cumsum(0) - 1
    return View(tokens, image.embeddings)


def kept(image: Features, chosen: Tensor, merged: Tensor | None = None) -> View:
    """The view of an image of which some patch tokens stay.

    Args
        chosen [n] int64: placeholders of patches, each once, in any order
        merged [n, hidden] float32: what stands at `chosen` from now on; their own embeddings if None
    """
    import torch

    tokens = with_marks(image.places, chosen)
    embeddings = image.embeddings[tokens]
    if merged is not None:
        embeddings[torch.searchsorted(tokens, chosen)] = merged
    return View(tokens, embeddings)


def with_marks(places: Tensor, chosen: Tensor) -> Tensor:
    """[n] int64, ascending: of an image at these places [N, 3] the patch tokens `chosen`, and the marks that stay with
    them.

    A mark stays as long as one patch of the row that it ends does: of the patches before it that stand side by side in
    a grid, crops next to one another included.
    """
    import torch

    is_mark = places[:, 0] < 0
    is_kept = torch.zeros_like(is_mark)
    is_kept[chosen] = True
    # Rows are counted along the placeholders; the thumbnail's are not those of the crops, and a mark ends its row.
    label = torch.stack((places[:, 1], places[:, 0].clamp(max=1)), 1)
    begins = torch.ones_like(is_mark)
    begins[1:] = (label[1:] != label[:-1]).any(1) & ~is_mark[1:] | (is_mark[:-1] & ~is_mark[1:])
    row = begins.long().cumsum(0) - 1
    alive = torch.zeros(len(places), dtype=torch.bool).index_fill_(0, row[is_kept], True)
    # A mark before all patches ends no row.
    leads = (~is_mark).long().cumsum(0) == 0
    is_kept |= is_mark & (alive[row] | leads)
    return is_kept.nonzero().squeeze(1)
