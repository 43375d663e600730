"""Dividing bytes by need."""

from __future__ import annotations


def divide(left: int, needs: dict[str, int], weights: dict[str, float]) -> dict[str, int]:
    """Weighted max-min fair shares of ``left`` bytes: nobody has more than it needs, and nobody
    could have more without one going short whose share by weight is no larger (progressive filling;
    Bertsekas and Gallager, Data Networks, 6.5.2). Fractions of a byte are nobody's."""
    shares = dict.fromkeys(needs, 0)
    total = sum(weights[name] for name, need in needs.items() if need > 0)
    for name in sorted(needs, key=lambda n: (needs[n] / weights[n], n)):
        if needs[name] <= 0:
            continue
        share = min(needs[name], int(left * (weights[name] / total)), left)
        shares[name] = share
        left -= share
        total -= weights[name]
    return shares
