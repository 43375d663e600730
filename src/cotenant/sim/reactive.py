"""A planner that reacts: the rival of planning ahead.

Where the recent p95 of a service is above ``HIGH`` of its objective, services get one step more
space; where all are below ``LOW``, one step less. No prediction, no trend, and idle space is
lent as Cotenant lends it, so that what differs is the planning alone.
"""

from __future__ import annotations

from typing import Final

from cotenant.policy.layouts import mig_layouts, unit_layouts
from cotenant.policy.planner import Planner
from cotenant.policy.views import Layout, View
from cotenant.policy.wishes import Wish, Wishes

HIGH: Final = 0.8
LOW: Final = 0.4


class ReactivePlanner(Planner):
    """See the module's docstring."""

    def _make_wishes(self) -> Wishes:
        return _Reactions(self.tuning, self.state, self._demand)


class _Reactions(Wishes):
    """Thresholds as autoscalers' users set them."""

    def _wish(self, view: View, current: Layout, least: int) -> Wish:
        return self._react(view, current, least)

    def _wish_mig(self, view: View, current: Layout, least: int) -> Wish:
        return self._react(view, current, least)

    def _react(self, view: View, current: Layout, least: int) -> Wish:
        hottest = max((s.p95 / s.objective for s in view.services), default=0.0)
        hottest = max([hottest, *(float(p.boost > 1.0) for p in self.state.pressure.values())])
        why = f"p95 at {hottest:.0%} of the objective"
        if hottest > HIGH:
            step = self._step(view, current, more=True)
            return Wish(step, why, self.tuning.grow_after)
        if hottest < LOW and current.compute > max(1, least):
            step = self._step(view, current, more=False)
            return Wish(step, why, self.tuning.shrink_after)
        return Wish(current)

    @staticmethod
    def _step(view: View, current: Layout, more: bool) -> Layout:
        """The smallest step up or down; the present layout at the end of the scale."""
        if view.device.mig:
            options = mig_layouts(view.device, current)
        else:
            wanted = current.compute + (1 if more else -1)
            options = unit_layouts(view.device, min(view.device.compute, wanted))
        sign = 1 if more else -1
        steps = [x for x in options if (x.compute - current.compute) * sign > 0]
        return min(
            steps, key=lambda x: (abs(x.compute - current.compute), len(x.mine)), default=current
        )
