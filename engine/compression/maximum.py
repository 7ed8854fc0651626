"""The most that a request may hold on a server."""

from __future__ import annotations

from pydantic import Field

from winnow.engine.compression.budget import Budget
from winnow.engine.compression.part import FormatName, Part
from winnow.engine.compression.plan import Plan
from winnow.engine.compression.policy import Reciting, SetsBudgets
from winnow.engine.compression.registry import eviction_policy
from winnow.engine.errors import RequestError
from winnow.kernels.layout import PageFormat


class Maximum(Part):
    """The most a request may hold on this server, as the operator writes it."""

    budget: Budget | None = Field(None, description="largest eviction budget: a fraction or a count")
    format: FormatName | None = Field(None, description="largest page format")

    def check(self, plan: Plan, at: str = "compression") -> None:
        """RequestError, naming the field and the limit, for a plan that may hold more.

        A limit that is a fraction cannot be compared with a count of tokens, nor the other way round: such a plan is
        refused. A plan that names no format holds f32; one that names a quality is checked when it has been chosen.
        """
        if plan.quality is not None:
            return
        if self.budget is not None:
            unit = "fraction of the tokens" if isinstance(self.budget, float) else "number of tokens"
            if plan.mix is not None:
                path = f"{at}.kv.mix"
                raise RequestError(path, f"{path} evicts nothing, and this server has a largest eviction budget")
            evict = plan.kv.evict
            policy = None if evict is None else eviction_policy(evict.policy)
            # Lanes of a policy that recites share the budget out among them; in all they keep no more.
            if evict is not None and isinstance(policy, SetsBudgets) and not isinstance(policy, Reciting):
                path = f"{at}.kv.evict.policy"
                raise RequestError(path, f"{path} '{evict.policy}' keeps all of some heads, which this server forbids")
            if evict is None or type(evict.budget) is not type(self.budget) or evict.budget > self.budget:
                path = f"{at}.kv.evict.budget"
                raise RequestError(path, f"{path} must be given, as a {unit} of at most {self.budget}, on this server")
            if plan.kv.scope is not None and evict.during == "prefill":
                path = f"{at}.kv.scope"
                why = "what follows a document is not evicted, and this server has a largest eviction budget"
                raise RequestError(path, f"{path}: {why}; leave it out, or evict during 'both'")
        if self.format is not None:
            held = plan.format if plan.format is not None else PageFormat.F32
            if held.mean_bits > PageFormat.parse(self.format).mean_bits:
                path = f"{at}.kv.{'format' if plan.mix is None else 'mix.format'}"
                raise RequestError(path, f"{path} must be given, as '{self.format}' or smaller, on this server")
