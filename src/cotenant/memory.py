"""What a job can be asked: ``cotenant.on_memory(give)``, memory back when others need it, and
``cotenant.on_checkpoint(save)``, a checkpoint now. Optional.

Standard library only, like ``cotenant.report``: outside Cotenant nothing happens.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import threading
import traceback

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

AGAIN_S = 10.0
"""So often a job says again that it can be asked: Cotenant may have been restarted."""
MAX_MESSAGE_BYTES = 1024


def _give_device_caches(_most: int) -> None:
    """What PyTorch and CuPy keep of device memory without using it goes back to the driver. Only
    where the program has imported them and has used the device: nothing is started for this."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is not None and cuda.is_initialized():
        cuda.empty_cache()
    cupy = sys.modules.get("cupy")
    for name in ("get_default_memory_pool", "get_default_pinned_memory_pool"):
        pool = getattr(cupy, name, None)
        if pool is not None:
            pool().free_all_blocks()


class _Listener:
    """Waits, in a thread of its own, to be asked."""

    def __init__(self, path: str) -> None:
        self.gives = False
        self.give: list[Callable[[int], None]] = []
        self.save: list[Callable[[], None]] = []
        self._closed = False
        self._path = path
        self._run = os.environ.get("COTENANT_JOB_RUN", "")
        self._job = os.environ.get("COTENANT_JOB_ID", "")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("")  # a name that the kernel makes up
        self._socket.settimeout(AGAIN_S)
        threading.Thread(target=self._listen, name="cotenant-memory", daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self._closed = True
        self._socket.shutdown(socket.SHUT_RD)  # which wakes the thread
        self._socket.close()

    def _listen(self) -> None:
        while True:
            try:
                data = self._socket.recv(MAX_MESSAGE_BYTES)
            except TimeoutError:
                self.say()
                continue
            except OSError:
                return
            if self._closed:
                return
            try:
                message = json.loads(data)
                run, saves = message["run"], message.get("checkpoint") is True
                most = 0 if saves else int(message["most"])
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            if run == self._run and saves:
                self._ask_to_save()
            elif run == self._run:
                self._ask(most)

    def say(self) -> None:
        """Tell Cotenant what this program can be asked."""
        here: dict[str, object] = {"job": self._job, "run": self._run}
        if self.gives:
            here["memory"] = True
        if self.save:
            here["saves"] = True
        try:
            self._socket.sendto(json.dumps(here).encode(), self._path)
        except OSError:
            return  # Cotenant is restarting; it hears of this the next time

    def _ask_to_save(self) -> None:
        for save in self.save:
            try:
                save()
            except Exception:  # as below
                traceback.print_exc()

    def _ask(self, most: int) -> None:
        for give in [*self.give, _give_device_caches]:  # these last: the program frees into them
            try:
                give(most)
            except Exception:  # it is the program's own, and no reason to end its thread
                traceback.print_exc()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # what was freed goes back to the system, not only to the allocator
            trim(0)


_listener: _Listener | None = None
_lock = threading.Lock()


def _after_fork() -> None:
    """A forked child is not asked by itself: its parent's thread is not there."""
    global _listener, _lock
    _listener, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def on_memory(give: Callable[[int], None] | None = None) -> bool:
    """Have ``give(most)`` called when this job is to have at most ``most`` bytes in all, because
    others need the rest: let caches go. What is freed is handed to the system afterwards: host
    memory, and the caches of device memory that PyTorch and CuPy have, if the program uses them:
    without ``give`` only these.

    It is called in a thread of its own, perhaps several times, and need not reach the goal: what
    it does not give is taken by writing pages out, where the machine can do that. Never called for
    what is within ``memory_guaranteed``. What it raises is printed. Returns whether it may be
    called: False outside Cotenant.
    """
    with _lock:
        listener = _listening()
        if listener is None:
            return False
        if give is not None:
            listener.give.append(give)
        if not listener.gives:
            listener.gives = True
            listener.say()
    return True


def on_checkpoint(save: Callable[[], None]) -> bool:
    """Have ``save()`` called when somebody wants a checkpoint now (``cotenant checkpoint JOB``).

    It is called in a thread of its own. As a rule it only sets a flag: the loop of the training
    sees that, writes the checkpoint between two steps, and says where it is, with
    ``cotenant.report(step, checkpoint=path)``. What it raises is printed. Returns whether it may be
    called: False outside Cotenant.
    """
    with _lock:
        listener = _listening()
        if listener is None:
            return False
        listener.save.append(save)
        if len(listener.save) == 1:
            listener.say()
    return True


def _listening() -> _Listener | None:
    """The one that listens for this process; None outside Cotenant. With the lock held."""
    global _listener  # noqa: PLW0603
    path = os.environ.get("COTENANT_REPORT_SOCKET")
    if _listener is None and path:
        try:
            _listener = _Listener(path)
        except OSError:
            return None
    return _listener if path else None
