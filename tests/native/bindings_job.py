"""A job on cuda-bindings: 200 launches that count; prints what was launched and what counted."""

import ctypes
from typing import Any

from cuda.bindings import driver


def ok(answer: tuple[Any, ...]) -> Any:
    """What a call returned besides its status."""
    assert int(answer[0]) == 0, answer
    return answer[1] if len(answer) > 1 else None


ok(driver.cuInit(0))
ok(driver.cuCtxSetCurrent(ok(driver.cuDevicePrimaryCtxRetain(0))))
module = ok(driver.cuModuleLoadData(b"x"))
function = ok(driver.cuModuleGetFunction(module, b"count_300"))
at = ok(driver.cuMemAlloc(8))
stream = ok(driver.cuStreamCreate(0))
LAUNCHES = 200
for _ in range(LAUNCHES):
    parameters = ((int(at),), (ctypes.c_uint64,))
    ok(driver.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, parameters, 0))
ok(driver.cuStreamSynchronize(stream))
value = ctypes.c_uint64()
ok(driver.cuMemcpyDtoH(ctypes.addressof(value), at, 8))
print(LAUNCHES, value.value)
