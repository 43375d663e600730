"""The ledgers of a box: which memory is divided, and among whom."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from cotenant.domain.device import DeviceSpec
from cotenant.policy.memory.account import Account
from cotenant.policy.memory.ledger import Ledger

KV: Final = "/kv"
"""Behind the id of a device or an instance: its pools, its pool."""


class Books:
    """``devices``: of each device whose memory is known, for instances and jobs. ``pools``: of each
    whose pools of keys and values are lent. They have a budget of their own out of the device's
    memory or, where that is all of it, one ledger with the others.

    ``touched``: devices whose ledger something has changed in since it was looked at.
    """

    def __init__(self, devices: Iterable[DeviceSpec], accounts: dict[str, Account]) -> None:
        self.devices: dict[str, Ledger] = {}
        self.pools: dict[str, Ledger] = {}
        self.touched: dict[str, None] = {}
        for device in devices:
            shared = 0 < device.memory <= device.kv
            if device.memory:
                reserved = 0 if shared else device.kv
                account = accounts.setdefault(device.id, Account(device.memory, reserved))
                self.devices[device.id] = Ledger(account)
            if shared:
                self.pools[device.id] = self.devices[device.id]
            elif device.kv:
                account = accounts.setdefault(device.id + KV, Account(device.kv))
                self.pools[device.id] = Ledger(account)
