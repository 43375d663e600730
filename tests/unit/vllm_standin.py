"""A stand-in for vLLM: the few classes of it that ``engines.llm.vllm`` uses, by their names.

It is no vLLM. It has a block pool, a scheduler that preempts, and a "model" whose next token
depends on every token before. So a test can tell whether an answer was put together rightly.
``test_llm_vllm_real.py`` runs the same engine on vLLM itself, where that is installed.
"""

from __future__ import annotations

import enum
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import pytest

from cotenant.engines.llm.vllm import ENVIRONMENT, VERSION

BLOCK, BLOCKS, BLOCK_BYTES, CONTEXT = 4, 13, 100, 40
EOS = 256


def next_token(tokens: list[int]) -> int:
    return ord("a") + sum((i + 3) * t for i, t in enumerate(tokens)) % 26


def answer(tokens: list[int], count: int) -> list[int]:
    """What the model says to a prompt."""
    said: list[int] = []
    for _ in range(count):
        said.append(next_token([*tokens, *said]))
    return said


class RequestOutputKind(enum.Enum):
    CUMULATIVE = 0
    DELTA = 1


class StructuredOutputsParams:
    def __init__(self, **form: Any) -> None:
        self.form = form


class StructuredOutputsConfig:
    def __init__(self, backend: str) -> None:
        self.backend = backend


class SamplingParams:
    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)
        if self.top_p == 0:
            raise ValueError("top_p must be in (0, 1]")


class EngineArgs:
    def __init__(self, **given: Any) -> None:
        self.given = given


@dataclass
class Logprob:
    logprob: float
    rank: int


@dataclass
class CompletionOutput:
    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[dict[int, Logprob]] | None


@dataclass
class RequestOutput:
    request_id: str
    outputs: list[CompletionOutput]
    num_cached_tokens: int | None


@dataclass
class Request:
    req_id: str
    tokens: list[int]
    params: SamplingParams
    salt: str | None
    prompt: int
    num_computed_tokens: int = 0
    blocks: list[int] = field(default_factory=list)


class BlockPool:
    def __init__(self) -> None:
        self.num_gpu_blocks = BLOCKS
        self.free = list(range(1, BLOCKS))

    def get_num_free_blocks(self) -> int:
        return len(self.free)

    def get_new_blocks(self, count: int) -> list[int]:
        if count > len(self.free):
            raise ValueError(f"Cannot get {count} free blocks from the pool")
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def free_blocks(self, blocks: list[int]) -> None:
        assert not set(blocks) & set(self.free)
        self.free += blocks


@dataclass
class CachedRequestData:
    req_ids: list[str] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)


@dataclass
class SchedulerOutput:
    scheduled_new_reqs: list[Any] = field(default_factory=list)
    scheduled_cached_reqs: CachedRequestData = field(default_factory=CachedRequestData)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)

    @classmethod
    def make_empty(cls) -> SchedulerOutput:
        return cls()


class Scheduler:
    """First come, first served; who finds no block puts the last one back to the waiting ones."""

    def __init__(self, kv_cache_config: Any) -> None:
        self.kv_cache_config = kv_cache_config
        self.pool = BlockPool()
        self.kv_cache_manager = types.SimpleNamespace(block_pool=self.pool)
        self.block_size = BLOCK
        self.max_num_scheduled_tokens = 32
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.preempted = 0

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        output, left = SchedulerOutput(), self.max_num_scheduled_tokens
        for request in list(self.running):
            if request in self.running:
                left -= self._add(output, request, left, new=False)
        while self.waiting and left:
            request = self.waiting[0]
            if self._missing(request, len(request.tokens)) > len(self.pool.free):
                break
            self.running.append(self.waiting.pop(0))
            left -= self._add(output, request, left, new=True)
        return output

    def _missing(self, request: Request, tokens: int) -> int:
        return -(-tokens // BLOCK) - len(request.blocks)

    def _add(self, output: SchedulerOutput, request: Request, left: int, new: bool) -> int:
        tokens = min(left, len(request.tokens) - request.num_computed_tokens)
        if not tokens:
            return 0
        missing = self._missing(request, request.num_computed_tokens + tokens)
        while missing > len(self.pool.free):
            last = self.running.pop()
            self.release(last)
            self.waiting.insert(0, last)
            self.preempted += 1
            if last is request:
                return 0
        request.blocks += self.pool.get_new_blocks(missing)
        if new:
            said = types.SimpleNamespace(
                req_id=request.req_id, num_computed_tokens=request.num_computed_tokens
            )
            output.scheduled_new_reqs.append(said)
        else:
            output.scheduled_cached_reqs.req_ids.append(request.req_id)
            output.scheduled_cached_reqs.num_computed_tokens.append(request.num_computed_tokens)
        output.num_scheduled_tokens[request.req_id] = tokens
        return tokens

    def release(self, request: Request) -> None:
        self.pool.free_blocks(request.blocks)
        request.blocks, request.num_computed_tokens = [], 0


class LLMEngine:
    def __init__(self, args: EngineArgs) -> None:
        if "refused" in args.given:
            raise ValueError("architecture is not supported")
        self.args = args.given
        config = types.SimpleNamespace(
            num_blocks=BLOCKS,
            kv_cache_tensors=[types.SimpleNamespace(size=BLOCKS * BLOCK_BYTES)] * 2,
        )
        self.scheduler = args.given["scheduler_cls"](kv_cache_config=config)
        core = types.SimpleNamespace(scheduler=self.scheduler)
        self.engine_core = types.SimpleNamespace(engine_core=core)
        self.model_config = types.SimpleNamespace(max_model_len=CONTEXT)
        self.params: list[SamplingParams] = []
        self.salts: list[str | None] = []
        self.calls: list[Any] = []
        """Of sleep mode, in their order."""
        self.fail: list[Exception] = []
        """What the next steps raise."""
        self.end: dict[str, str] = {}
        """Requests that are ended by vLLM, and why."""
        self.known: set[str] = set()

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> LLMEngine:
        return cls(args)

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> None:
        tokens = prompt["prompt_token_ids"]
        self.known.add(request_id)
        if max(tokens) > EOS:
            raise RuntimeError(f"Token id {max(tokens)} is out of vocabulary")
        self.params.append(params)
        self.salts.append(prompt["cache_salt"])
        request = Request(request_id, list(tokens), params, prompt["cache_salt"], len(tokens))
        self.scheduler.waiting.append(request)

    def abort_request(self, ids: list[str]) -> None:
        self.known -= set(ids)
        for queue in (self.scheduler.running, self.scheduler.waiting):
            for request in [each for each in queue if each.req_id in ids]:
                self.scheduler.release(request)
                queue.remove(request)

    def step(self) -> list[RequestOutput]:
        output = self.scheduler.schedule(False)
        if self.fail:
            raise self.fail.pop(0)
        said = []
        for request in list(self.scheduler.running):
            request.num_computed_tokens += output.num_scheduled_tokens.get(request.req_id, 0)
            if request.num_computed_tokens == len(request.tokens):
                said.append(self._say(request))
        return said

    def _say(self, request: Request) -> RequestOutput:
        token, params = next_token(request.tokens), request.params
        request.tokens.append(token)
        reason = self.end.get(request.req_id)
        if len(request.tokens) - request.prompt >= params.max_tokens:
            reason = reason or "length"
        told = None
        if params.logprobs is not None:
            ranked = {token: Logprob(-0.5, 2), 65: Logprob(-0.25, 1), 66: Logprob(-3.0, 3)}
            told = [dict(list(ranked.items())[: params.logprobs + 1])]
        if reason:
            self.abort_request([request.req_id])
        done = CompletionOutput(chr(token), [token], reason, told)
        return RequestOutput(request.req_id, [done], 3)

    def sleep(self, level: int, mode: str) -> None:
        held = sum(len(each.blocks) for each in self.scheduler.running)
        assert len(self.scheduler.pool.free) + held == BLOCKS - 1, "blocks that no request has"
        self.calls.append(("sleep", level, mode))

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(("wake_up", tags))

    def collective_rpc(self, method: str) -> None:
        self.calls.append(method)


class Platform:
    def __init__(self, sleeps: bool) -> None:
        self.sleeps = sleeps

    def is_sleep_mode_available(self) -> bool:
        return self.sleeps

    def is_cpu(self) -> bool:
        return not self.sleeps


def tokens_input(tokens: list[int], cache_salt: str | None = None) -> dict[str, Any]:
    return {"type": "token", "prompt_token_ids": tokens, "cache_salt": cache_salt}


def install(patch: pytest.MonkeyPatch, version: str = VERSION, sleeps: bool = False) -> None:
    """Put it where vLLM would be imported from, for as long as ``patch`` lasts."""
    for name in ENVIRONMENT:
        patch.setenv(name, "")
    modules: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": version},
        "vllm.config": {"StructuredOutputsConfig": StructuredOutputsConfig},
        "vllm.engine.arg_utils": {"EngineArgs": EngineArgs},
        "vllm.inputs": {"tokens_input": tokens_input},
        "vllm.platforms": {"current_platform": Platform(sleeps)},
        "vllm.sampling_params": {
            "RequestOutputKind": RequestOutputKind,
            "SamplingParams": SamplingParams,
            "StructuredOutputsParams": StructuredOutputsParams,
        },
        "vllm.v1.core.sched.output": {"SchedulerOutput": SchedulerOutput},
        "vllm.v1.core.sched.scheduler": {"Scheduler": Scheduler},
        "vllm.v1.engine.llm_engine": {"LLMEngine": LLMEngine},
    }
    parents = {name.rsplit(".", n)[0] for name in modules for n in range(1, name.count(".") + 1)}
    for name in sorted(parents | modules.keys()):
        module = types.ModuleType(name)
        module.__dict__.update(modules.get(name, {}))
        patch.setitem(sys.modules, name, module)
