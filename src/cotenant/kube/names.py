"""What this driver calls things where others read them: in the API, in conditions, in taints."""

from __future__ import annotations

from typing import Final

DRIVER: Final = "cotenant.dev"
API: Final = "cotenant.dev/v1alpha1"
"""The ``apiVersion`` of a claim's parameters."""
PARAMETERS: Final = "ClaimParameters"
"""Their ``kind``."""

PLANNED: Final = "cotenant.dev/planned"
"""Condition: the planner keeps what was allocated. The scheduler binds no pod before."""
REFUSED: Final = "cotenant.dev/refused"
"""Condition: the planner cannot keep it. The scheduler gives the devices back and looks again."""

GONE: Final = "cotenant.dev/gone"
"""Taint: the node no longer has the device."""
AWAY: Final = "cotenant.dev/away"
"""Taint: the node does not answer."""
TROUBLE: Final = "cotenant.dev/trouble"
"""Taint: the node says that the device fails."""

SHARE: Final = "share"
"""The capacity that claims take: whole per cents."""
RESERVED: Final = "k8s:"
"""What the ids of this driver's reservations begin with."""
