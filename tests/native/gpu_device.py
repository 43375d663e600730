"""Drives a ``CudaDevice`` for test_cuda_device.py, a line at a time.

Reads Python from standard input, answers each line with JSON of the value of ``answer``. A process
of its own, because the loader must find the stand-ins.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

from cotenant.devices.nvidia import gates, selftest, shim
from cotenant.devices.nvidia.device import CudaDevice
from cotenant.domain.device import Partition, Tenant, TenantKind
from cotenant.domain.device_config import CudaConfig

PART = Partition("cuda:0", "cuda", (0,))
JOB = os.environ["COTENANT_JOB"]


def start(
    device: CudaDevice, name: str, command: str, memory: int = 0, **owned: str
) -> "subprocess.Popen[bytes]":
    """A job: a root, of which the command is a child."""
    launch = device.launch(Tenant(name, TenantKind.JOB, memory=memory), None)
    root = subprocess.Popen(
        ["sh", "-c", f"exec 3<&0; {{ {command}; }} <&3 & echo $!; wait"],
        env=launch.applied({**os.environ, **owned}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    device.attach(Tenant(name, TenantKind.JOB), root.pid)
    return root


names = {
    "CudaConfig": CudaConfig,
    "CudaDevice": CudaDevice,
    "JOB": JOB,
    "NODE": Path(os.environ["STANDIN_STATS"]).parent,
    "PART": PART,
    "Tenant": Tenant,
    "TenantKind": TenantKind,
    "gates": gates,
    "os": os,
    "selftest": selftest,
    "shim": shim,
    "start": start,
}
for line in sys.stdin:
    names["answer"] = None
    try:
        exec(line, names)
        print(json.dumps({"is": names["answer"]}, default=str), flush=True)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"raised": type(error).__name__, "why": str(error)}), flush=True)
