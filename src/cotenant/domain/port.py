"""How front ends (REST, gRPC, control socket, Kubernetes) see the node: one Protocol.

Front ends turn bytes into these calls and the answers back into bytes. They decide nothing,
hold no model and know no device. ``cotenant.cli.wiring`` hands them the node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from cotenant.domain.errors import NotFound
from cotenant.domain.request import Refusal
from cotenant.domain.reservation import Answer, Reservation, ReservationStatus
from cotenant.domain.workload import JobSpec, Share

DATATYPES: dict[str, int] = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "BF16": 2,
    "FP32": 4,
    "FP64": 8,
    "BYTES": 0,
}
"""Open Inference Protocol datatypes and their element size in bytes (0: variable; each
element is a 4-byte little-endian length followed by that many bytes)."""


class TensorMeta(msgspec.Struct, frozen=True, omit_defaults=True):
    """Name, datatype and shape of a model's input or output; -1 is any length. ``optional``: a
    request may leave the input out; only models that answer in turns have such inputs."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


class ModelMeta(msgspec.Struct, frozen=True):
    """What clients may know of a model. ``versions`` are those loaded now, newest last;
    ``pieces`` says whether it may answer in pieces; ``context`` is, of a language model, the most
    tokens of prompt and answer together."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMeta, ...]
    outputs: tuple[TensorMeta, ...]
    pieces: bool = False
    context: int = 0


class IndexEntry(msgspec.Struct, frozen=True):
    """One line of the model repository: ``state`` is READY, LOADING, UNAVAILABLE or UNLOADING."""

    name: str
    version: str
    state: str
    reason: str


class TensorIn(msgspec.Struct):
    """An input tensor. Its bytes (little-endian, row-major) are ``data``, or are fetched by
    calling ``read_into`` with a writable buffer of ``nbytes`` (a client's shared memory)."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    nbytes: int
    data: bytes | bytearray | memoryview | None = None
    read_into: Callable[[memoryview], None] | None = None


class TensorOut(msgspec.Struct):
    """An output tensor; ``data`` is valid until ``InferResult.release`` is called."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: memoryview


class InferCall(msgspec.Struct):
    """One inference. ``timeout_ns`` 0 = the service's objective sets the deadline.
    ``outputs`` empty = all. ``priority`` is a class 0..2 (see ``PRIORITY_CLASSES``). ``pieces``:
    whether the answer may come in pieces; a model that answers so is refused otherwise."""

    model: str
    inputs: list[TensorIn]
    version: str = ""
    id: str = ""
    outputs: tuple[str, ...] = ()
    priority: int = 1
    timeout_ns: int = 0
    pieces: bool = False


class InferResult(msgspec.Struct):
    """The answer, or a piece of it: with ``more`` others follow. The last may have no outputs.
    ``variant`` gave it; "" where the model has one alone.

    Call ``release`` exactly once when the bytes have been written out. Pieces that were not
    released add up: beyond a stated limit the request is withdrawn, and answered UNREAD.
    """

    model: str
    version: str
    outputs: list[TensorOut]
    release: Callable[[], None]
    more: bool = False
    variant: str = ""


class Refused(msgspec.Struct, frozen=True):
    """An expected refusal, a value and not an exception. ``retry_after`` in ns, 0 = never."""

    refusal: Refusal
    retry_after: int
    detail: str

    @property
    def message(self) -> str:
        """One sentence for the client."""
        return f"{self.refusal.value}: {self.detail}" if self.detail else self.refusal.value


Outcome = InferResult | Refused
OnOutcome = Callable[[Outcome], None]
Withdraw = Callable[[], None]


class JobStatus(msgspec.Struct, frozen=True):
    """A job as ``cotenant jobs`` shows it. ``rate`` is progress (or CPU seconds) per second."""

    id: str
    name: str
    state: str
    command: tuple[str, ...]
    weight: float
    guaranteed: Share
    created: float
    restarts: int
    pid: int = 0
    exit_code: int | None = None
    reason: str = ""
    progress: float = 0.0
    progress_unit: str = "steps"
    rate: float = 0.0
    cpu_s: float = 0.0
    held_s: float = 0.0
    pauses: int = 0
    partitions: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    metrics: dict[str, float | None] = {}
    """What the job reported beside its steps; None for what was no number."""
    checkpoint: str = ""
    """Path or URL of the newest checkpoint that it reported as complete; empty: none."""
    checkpoint_step: float | None = None
    checkpoint_at: float = 0.0
    """When it said so, in wall-clock seconds since 1970."""
    held: bool = False
    """Somebody keeps it from running."""


def find_job(jobs: Sequence[JobStatus], ref: str) -> JobStatus:
    """The job that an id, a name (its newest job) or a unique prefix of an id means, of ``jobs``,
    oldest first. Raises NotFound."""
    for matches in (
        [job for job in jobs if job.id == ref],
        [job for job in jobs if job.name == ref],
    ):
        if matches:
            return matches[-1]
    begun = [job for job in jobs if ref and job.id.startswith(ref)]
    if len(begun) == 1:
        return begun[0]
    if begun:
        several = ", ".join(job.id for job in begun[:5])
        raise NotFound(f"{ref!r} is the beginning of several jobs: {several}")
    raise NotFound(f"there is no job {ref[:128]!r}; `cotenant jobs` lists them")


class Held(msgspec.Struct, frozen=True):
    """Who held what for ``seconds`` up to ``until`` (seconds since the epoch): of each device, its
    units that each workload (``service:NAME``, ``job:ID``) had in the mean."""

    until: float
    seconds: float
    devices: dict[str, dict[str, float]]


class Picture(Protocol):
    """An image of a prompt: its size is known, it is not decoded yet."""

    @property
    def tokens(self) -> int:
        """Image tokens of the prompt that stand for it."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of its tiles: how many, height, width, colours."""

    def pixels(self) -> bytes:
        """Its tiles, a byte a colour. Raises InvalidRequest if it is damaged. May take a second:
        not on a loop."""


class Language(Protocol):
    """The tokenizer and the chat template of a language model. Can be called from any thread."""

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""

    @property
    def template(self) -> str:
        """The chat template as it came with the model, or ""."""

    @property
    def sees(self) -> bool:
        """Whether the model sees images."""

    def picture(self, data: bytes) -> Picture:
        """An image, of the bytes of its file. Raises InvalidRequest for what is none, or is beyond
        a bound."""

    def encode(self, text: str, special: bool, most: int) -> list[int]:
        """The tokens of a prompt, with what the model wants before each. ``special``: whether text
        such as ``<|im_start|>`` is the special token. Raises TooLarge for more than ``most``."""

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        most: int,
        pictures: Sequence[Picture] = (),
        **names: Any,
    ) -> list[int]:
        """The tokens of a conversation that the model is to go on with, by its chat template;
        ``names`` are what else that is to know. ``pictures``: one for each part of a content that
        is ``{"type": "image"}``, in order. Raises InvalidRequest if it does not take these
        messages, TooLarge. May take seconds: not on a loop."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special ones are left out."""

    def piece(self, token: int) -> bytes:
        """A token's own bytes; none if there is no such token."""


class NodePort(Protocol):
    """The node as front ends see it. It must be called on the node's own loop.

    Raises as in ``cotenant.domain.errors``: ``NotFound`` for unknown names, ``NotReady`` for
    models being loaded, ``InvalidRequest`` for input that does not fit, ``TooLarge`` over a limit,
    ``ModelError`` for a failed load.
    """

    def is_ready(self) -> bool:
        """Whether every declared model is loaded and warmed, and the node is not draining."""

    def model_ready(self, name: str, version: str = "") -> bool:
        """Whether this model (version) can be inferred now; False for unknown names."""

    def metadata(self, name: str, version: str = "") -> ModelMeta:
        """Metadata; raises NotFound, NotReady."""

    async def language(self, name: str, version: str = "") -> Language:
        """How to write prompts for a language model; raises NotFound, NotReady, and
        InvalidRequest if it is none."""

    def index(self) -> list[IndexEntry]:
        """All models in the repository, loaded or not."""

    async def load(self, name: str) -> None:
        """Load (or reload the newest version of) a model, and undo its rollback; raises ModelError,
        NotFound."""

    async def unload(self, name: str) -> None:
        """Drain and unload a model; raises NotFound."""

    async def rollback(self, name: str) -> str:
        """Serve the version before the one that serves, and keep to it until ``load``, also after a
        restart; returns which that is. Raises NotFound, NotReady, ModelError, and InvalidRequest
        where there is none."""

    def most_elements(self, name: str, version: str = "") -> int | None:
        """The most elements that the inputs of a request to a model can have together, None where
        its shapes or its strings are free; raises NotFound, NotReady."""

    def submit(self, call: InferCall, done: OnOutcome) -> Withdraw | Refused:
        """Validate and queue. ``done`` is called from the loop and never from within, with the
        result or a refusal: once, or for ``call.pieces`` with each piece in turn, until one has no
        ``more`` or is a refusal. Once the request is withdrawn it is not called again."""

    def statistics(self, name: str, version: str = "") -> dict[str, Any]:
        """Counters of one model, in ns and counts; ``""`` is not a wildcard. Keys: version,
        last_inference_ms, inference_count, execution_count, success_count, success_ns,
        fail_count, fail_ns, queue_count, queue_ns, compute_input_ns, compute_infer_ns,
        compute_output_ns."""

    def metrics(self) -> bytes:
        """Prometheus text exposition."""

    def status(self) -> dict[str, Any]:
        """Everything ``cotenant status`` and ``cotenant top`` show, as JSON-ready values."""

    def timeline(self) -> list[Held]:
        """Who held what in the last minute, oldest first, a piece for each interval of the
        planner."""

    def plan(self, dry_run: bool) -> dict[str, Any]:
        """The plan in force and, for a ``dry_run``, the one that would be made now with what it
        would take; changes nothing. JSON-ready."""

    def submit_job(self, spec: JobSpec) -> str:
        """Queue a job durably; returns its id. The same again under the same id changes nothing.
        Raises InvalidRequest, TooLarge, Conflict for another job under an id that is taken, and
        NotFound for one that it is to come after."""

    def jobs(self) -> list[JobStatus]:
        """All jobs, oldest first."""

    def cancel_job(self, ref: str) -> str:
        """Cancel by id, unique id prefix or name; returns the id; raises NotFound."""

    def hold_job(self, ref: str) -> str:
        """Keep a running job from any partition until it is resumed; returns the id."""

    def resume_job(self, ref: str) -> str:
        """Let a held job run again; returns the id."""

    def job_log_path(self, ref: str) -> str:
        """Path of the job's log file; raises NotFound."""

    async def checkpoint_job(self, ref: str, within_s: float) -> str:
        """Ask a running job to write a checkpoint now; the path or URL that it reports. Raises
        NotFound, InvalidRequest if it cannot be asked, NotReady if nothing came ``within_s``."""

    def reserve(self, reservation: Reservation, dry_run: bool) -> Answer:
        """Ask the planner for room and, unless it is a ``dry_run``, keep it, durably. The same
        again is answered by what there is. Raises InvalidRequest for what can never be reserved
        here, and for another reservation under an id that is taken."""

    def release(self, id: str) -> None:
        """Give a reservation up: its processes run on, unconfined. No effect if there is none."""

    def adopt(self, id: str, pid: int) -> None:
        """Have a process on this host, with all that descends from it, be a reservation's; the
        same again changes nothing. Raises NotFound, NotReady before the reservation has its space,
        InvalidRequest if there is no such process or it is another's."""

    def reservations(self) -> list[ReservationStatus]:
        """All reservations, oldest first."""
