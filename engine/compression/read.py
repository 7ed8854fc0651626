"""`kv.read` of a plan: which policy chooses what generated tokens read, and what it can be combined with."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from winnow.engine.compression.knobs import any_method, method_model, schemas
from winnow.engine.compression.read_policy import LaneShape, Profile, ReadParams
from winnow.engine.compression.registry import READ, eviction_policy, read_policy
from winnow.engine.compression.signals import Signal
from winnow.engine.errors import PlanNotSupported

if TYPE_CHECKING:
    from winnow.engine.compression.plan import Evict
    from winnow.kernels.reading import ReadRule

STEP_ROWS = 64
"""Most rows of a sequence that read by a rule in one step: each has its own choice"""


class Read(ReadParams):
    """An instance is of `read_model(policy)`: it has the policy's knobs, and is itself the `params` of its methods."""

    policy: str

    @property
    def reads_all(self) -> bool:
        return self.tokens == 1.0 and isinstance(self.tokens, float)

    @property
    def keeps_choices(self) -> bool:
        """`ReadPolicy.keeps_choices` of the plan's policy."""
        return read_policy(self.policy).keeps_choices

    def rule(self, shape: LaneShape, profile: Profile) -> ReadRule:
        """`ReadPolicy.rule` of the plan's policy."""
        return read_policy(self.policy).rule(self, shape, profile)

    def check_with(self, evict: Evict | None, at: str) -> None:
        """PlanNotSupported if the eviction leaves lanes that the policy cannot read, or needs to see all reads."""
        if evict is None:
            return
        path = f"{at}.kv.read.policy"
        if evict.merge is not None:
            reason = f"what {self.policy} chooses by does not show how many tokens a merged one stands for"
            raise PlanNotSupported(
                path, f"{path}: {reason}; leave out 'evict.merge' ('{evict.merge.policy}') or 'read'"
            )
        if evict.is_compact:
            reason = f"{self.policy} knows keys by what they were, and compact positions turn them at every eviction"
            raise PlanNotSupported(path, f"{path}: {reason}")
        if read_policy(self.policy).shares_choices:
            reason = f"{self.policy} reads the same tokens in several lanes; after '{evict.policy}' each holds its own"
            raise PlanNotSupported(path, f"{path}: {reason}")
        if evict.during != "prefill" and Signal.ATTENTION in eviction_policy(evict.policy).signals:
            reason = f"'{evict.policy}' during '{evict.during}' scores what generated tokens read of the whole lane"
            raise PlanNotSupported(path, f"{path}: {reason}, and {self.policy} lets them read a part")


@cache
def read_model(name: str) -> type[Read]:
    """The model of `read` for one policy."""
    return method_model(Read, name, read_policy(name))


if TYPE_CHECKING:
    AnyRead = Read
else:
    AnyRead = any_method(read_model, READ)


def read_schema() -> dict[str, dict[str, Any]]:
    """JSON schema of `kv.read` for each policy, by name."""
    return schemas(read_model, READ)
