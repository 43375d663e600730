"""vLLM behind a worker's contract: inputs and outputs are those of ``contract``. Extra ``vllm``.

The worker's process is the one that vLLM would start for itself: its engine, scheduler and model
are in it. Laws:

1. A turn is one step of vLLM. Its scheduler has an allowance of tokens during a turn alone; without
   one it schedules nothing, whoever calls. Steps are not overlapped: what a turn has started is
   done when it returns.
2. Blocks of the *balloon* are taken from vLLM's pool as a request takes its own, and kept. So vLLM
   cannot use them. None is ever taken from a request: the balloon waits until blocks are free.
3. What vLLM says against a request is the error of that request alone. A step that fails ends all
   requests; if the next one fails too, its exception passes, and ends the worker if it is no
   ``FAILURES``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from cotenant.domain.errors import InvalidRequest, ModelError, TooLarge
from cotenant.engines.base import Array, EngineMeta, Turn, Turns
from cotenant.engines.llm import asking, contract
from cotenant.engines.llm.asking import Chosen, Details, Options
from cotenant.engines.llm.forms import check_form, check_repeats
from cotenant.engines.llm.text import Text
from cotenant.policy.iterations import IterationCosts, Load, load
from cotenant.policy.memory.account import PoolUse

VERSION: Final = "0.32.0"
"""Of vLLM. What is used here is not its public interface, so any other is refused."""
SMALLEST: Final = 16
"""Tokens of prompts that a turn may compute, however short it is to be."""
ENVIRONMENT: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # which cores it has is the node's business
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",  # a model is what is on the disk
}
"""Read by vLLM when it is imported."""
REPEATS: Final = 1000
"""Of a part of a form. Its version of llguidance takes memory for each, without an end."""
SEEDS: Final = 1 << 63
"""vLLM takes seeds below this; -1 is none to it."""


class Balloon:
    """Of a pool of blocks, those that vLLM may not use."""

    def __init__(self, pool: Any, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.most = pool.num_gpu_blocks - 1
        """Blocks that the pool can have in use; one is vLLM's placeholder."""
        self._pool = pool
        self._target = self.most
        self._held: list[Any] = []

    def resize(self, target: int) -> None:
        """Leave so many bytes to vLLM, in whole blocks. What requests have is waited for."""
        self._target = min(max(0, target) // self.block_bytes, self.most)
        self.settle()

    def settle(self) -> None:
        """Take what is missing, as far as it is free, or let go of what is too much."""
        wanted = self.most - self._target
        missing = min(wanted - len(self._held), self._pool.get_num_free_blocks())
        if missing > 0:
            self._held += self._pool.get_new_blocks(missing)
        self._shrink(wanted)

    @property
    def left(self) -> int:
        """Blocks that are vLLM's."""
        return int(self.most) - len(self._held)

    @property
    def spare(self) -> int:
        """Blocks of these that no request has."""
        return int(self._pool.get_num_free_blocks())

    def release(self) -> None:
        """Let go of all blocks until it is next settled."""
        self._shrink(0)

    def _shrink(self, size: int) -> None:
        self._pool.free_blocks(self._held[size:])
        del self._held[size:]


def scheduler_class() -> type:
    """vLLM's scheduler with an allowance and a balloon; see the module's text."""
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

    class LeasedScheduler(Scheduler):  # type: ignore[misc]  # vLLM has no types where it is not
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            config, pool = self.kv_cache_config, self.kv_cache_manager.block_pool
            # Each of its tensors is a view of one allocation, and tells the size of that.
            size = max((tensor.size for tensor in config.kv_cache_tensors), default=0)
            self.balloon = Balloon(pool, max(1, size // config.num_blocks))
            self.allowance = 0
            """Tokens that the next schedule may have; 0: none."""
            self.work = Load()
            """Of the last schedule."""
            self._most_tokens: int = self.max_num_scheduled_tokens

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            self.work = Load()
            if not self.allowance:
                return SchedulerOutput.make_empty()
            self.balloon.settle()
            least = len(self.running) + SMALLEST
            self.max_num_scheduled_tokens = min(self._most_tokens, max(least, self.allowance))
            output = super().schedule(*args, **kwargs)
            self.work = work_of(output)
            return output

    return LeasedScheduler


def work_of(output: Any) -> Load:
    """Of a scheduler's output."""
    cached = output.scheduled_cached_reqs
    starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    total = Load()
    for request, tokens in output.num_scheduled_tokens.items():
        total += load(starts[request], tokens)
    return total


class VllmEngine:
    """A ``TurnEngine``; see the module's text. Raises ModelError, and ImportError without vLLM.

    ``kv``: at most so many bytes for keys and values. ``more``: arguments of vLLM's
    ``EngineArgs`` in place of those that are chosen here."""

    def __init__(self, path: Path, kv: int, more: Mapping[str, Any] | None = None) -> None:
        os.environ.update(ENVIRONMENT)
        import vllm

        if vllm.__version__.partition("+")[0] != VERSION:
            right = f"{VERSION} is needed: pip install 'cotenant[vllm]'"
            raise ModelError(f"vLLM {vllm.__version__} is installed, and {right}")
        self._text = Text.from_folder(path.parent)
        try:
            self._open(path.parent, {"kv_cache_memory_bytes": kv, **(more or {})})
        except Exception as error:  # whatever a model brings about
            raise ModelError(f"vLLM cannot open it: {error}") from error
        self._costs = IterationCosts()
        self._failed = False
        self._parked = 0
        self._answers: dict[int, _Answer] = {}

    def _open(self, folder: Path, more: Mapping[str, Any]) -> None:
        from vllm.config import StructuredOutputsConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        self._sleeps = bool(current_platform.is_sleep_mode_available())
        arguments: dict[str, Any] = {
            "model": str(folder),
            "load_format": "safetensors",
            "max_model_len": -1,  # the model's, or what its memory holds
            "enforce_eager": bool(current_platform.is_cpu()),
            "enable_sleep_mode": self._sleeps,
            "scheduler_cls": scheduler_class(),
            "async_scheduling": False,
            "distributed_executor_backend": "uni",
            # The library that our own engine uses: grammars mean the same in both.
            "structured_outputs_config": StructuredOutputsConfig(backend="guidance"),
            "disable_log_stats": True,
        }
        self._llm = LLMEngine.from_engine_args(EngineArgs(**{**arguments, **more}))
        self._scheduler = self._llm.engine_core.engine_core.scheduler
        self._context = int(self._llm.model_config.max_model_len)
        self.balloon: Balloon = self._scheduler.balloon

    @property
    def meta(self) -> EngineMeta:
        balloon, tokens = self.balloon, self._scheduler.block_size
        return contract.language_meta(
            "vllm", self._context, balloon.most, tokens, balloon.block_bytes
        )

    def begin(self, key: int, inputs: dict[str, Array], due: int = 0, pace: int = 0) -> None:  # noqa: ARG002
        """vLLM takes requests in the order in which they came."""
        try:
            options = contract.read_options(inputs)
            prompt = contract.read_prompt(inputs, self._encode)
            self._check(prompt, options)
        except (InvalidRequest, TooLarge) as error:
            raise ModelError(str(error)) from error
        from vllm.inputs import tokens_input

        try:
            given = tokens_input(list(prompt), cache_salt=options.salt or None)
            self._llm.add_request(str(key), given, _parameters(options))
        except Exception as error:  # of whatever kind, it is about this request
            self._llm.abort_request([str(key)])
            raise ModelError(f"vLLM refuses it: {error}") from error
        length = len(prompt) + options.max_tokens
        self._answers[key] = _Answer(length, "options" in inputs, options.logprobs)

    def _encode(self, text: str) -> list[int]:
        return self._text.encode(text, special=True, most=self._context)

    def _check(self, prompt: tuple[int, ...], options: Options) -> None:
        """What our own engine refuses is refused here too."""
        problem = contract.sampling_of(options).problem()
        if problem or options.embed:
            raise InvalidRequest(problem or "engine: vllm makes no embeddings")
        if not prompt or options.max_tokens < 1:
            raise InvalidRequest("a prompt and an answer have at least one token each")
        if options.grammar:
            check_form(options.grammar)
            check_repeats(options.grammar, REPEATS)
        if len(prompt) + options.max_tokens > self._context:
            total = f"{len(prompt)} of the prompt and up to {options.max_tokens} of the answer"
            raise TooLarge(f"{total} are more tokens than {self._context}")

    def turn(self, units: int, keys: Sequence[int], budget: int) -> Turns:  # noqa: ARG002
        """``units`` are those that the process was started on. What others say in the step is kept
        for their next turn."""
        if self._parked:
            raise ModelError("the model is parked; it has to be woken first")
        began = time.monotonic_ns()
        self._scheduler.allowance = self._allowance(budget)
        try:
            outputs = self._llm.step()
        except Exception as error:
            if self._failed:
                raise
            self._failed = True
            self.forget(tuple(self._answers))
            raise ModelError(f"a step of vLLM failed: {error}") from error
        finally:
            self._scheduler.allowance = 0
        self._failed = False
        work = self._scheduler.work
        if work.tokens:
            self._costs.observe(work, time.monotonic_ns() - began)
        for output in outputs:
            self._answers[int(output.request_id)].add(output)
        return Turns([self._take(key) for key in keys], (work.tokens, work.pairs))

    def _allowance(self, budget: int) -> int:
        """Tokens that are computed in about ``budget`` ns, one at least."""
        costs = self._costs
        return max(1, costs.within((budget or 1 << 62) - costs.fixed - costs.step, 0))

    def _take(self, key: int) -> Turn:
        turn = self._answers[key].turn()
        if turn.finished:
            del self._answers[key]
        return turn

    def forget(self, keys: Sequence[int]) -> None:
        known = [str(key) for key in keys if self._answers.pop(key, None)]
        if known:
            self._llm.abort_request(known)

    def resize(self, size: int) -> None:
        """Use at most so many bytes for keys and values, from when no request has more."""
        self.balloon.resize(size)

    def pool_use(self) -> PoolUse:
        """Of what vLLM may use; its memory stays its own until it is parked."""
        size = self._scheduler.block_size
        lengths = [-(-answer.length // size) for answer in self._answers.values()]
        least, spare = lengths[0] if lengths else 0, self.balloon.spare
        blocks = (self.balloon.left, sum(lengths), spare, spare, least)
        return PoolUse(*(count * self.balloon.block_bytes for count in blocks))

    def park(self, level: Literal[1, 2]) -> None:
        """Give the device's memory back: 1 keeps a copy of the weights on the host, 2 none.
        Requests stay, and are read again when it is woken. Raises ModelError where vLLM cannot."""
        if not self._sleeps:
            raise ModelError("vLLM has no sleep mode on this device; unload the model instead")
        if self._parked:
            return
        self.balloon.release()  # a pool that is to be emptied may have nothing in use
        self._llm.sleep(level, mode="keep")
        self._parked = level

    def wake(self) -> None:
        """Take it again."""
        if self._parked == 2:
            self._llm.wake_up(["weights"])
            self._llm.collective_rpc("reload_weights")
        if self._parked:
            self._llm.wake_up(["kv_cache"] if self._parked == 2 else None)
        self._parked = 0
        self.balloon.settle()


SAME: Final = (
    *("max_tokens", "temperature", "top_k", "top_p", "min_p", "ignore_eos", "logprobs"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
"""Settings that vLLM calls by the same names."""
FORMS: Final[dict[type, Callable[[Any], dict[str, Any]]]] = {
    asking.JsonObject: lambda _: {"json_object": True},
    asking.JsonSchema: lambda spec: {"json": spec.schema},
    asking.Expression: lambda spec: {"regex": spec.pattern},
    asking.Lark: lambda spec: {"grammar": spec.grammar},
    asking.OneOf: lambda spec: {"choice": list(spec.choices)},
}


def _parameters(options: Options) -> Any:
    """As vLLM's."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    form = options.grammar
    return SamplingParams(
        **{name: getattr(options, name) for name in SAME},
        seed=options.seed % SEEDS,
        logit_bias=dict(options.logit_bias) or None,
        stop=list(options.stop),
        structured_outputs=form and StructuredOutputsParams(**FORMS[type(form)](form)),
        output_kind=RequestOutputKind.DELTA,
    )


class _Answer:
    """Of a request, what was not given out yet. ``length``: tokens of its prompt and its answer, at
    most; ``logprobs``: as in ``Options``."""

    def __init__(self, length: int, detailed: bool, logprobs: int | None) -> None:
        self.length = length
        self._detailed = detailed
        self._most = logprobs or 0
        self._outputs: list[Any] = []

    def add(self, output: Any) -> None:
        """What a step said."""
        self._outputs.append(output)

    def turn(self) -> Turn:
        """As one turn."""
        outputs, self._outputs = self._outputs, []
        if not outputs:
            return Turn(None, finished=False)
        said = [output.outputs[0] for output in outputs]  # of one answer to a prompt
        reason = said[-1].finish_reason or ""
        if reason not in ("", "stop", "length"):
            return Turn(None, finished=True, error=f"vLLM ended it: {reason}")
        tokens = [token for each in said for token in each.token_ids]
        details = None
        if self._detailed:
            chosen = tuple(choice for each in said for choice in self._chosen(each))
            details = Details(said=chosen, cached=outputs[-1].num_cached_tokens or 0)
        text = "".join(each.text for each in said)
        written = contract.write_outputs(text, tokens, reason, details)
        return Turn(written, bool(reason), said=len(tokens))

    def _chosen(self, said: Any) -> Iterator[Chosen]:
        """vLLM tells, by token, of the chosen one and the likeliest ones, with their ranks."""
        if not said.logprobs:
            yield from map(Chosen, said.token_ids)
            return
        for token, among in zip(said.token_ids, said.logprobs, strict=True):
            ranked = sorted((told.rank, other, told.logprob) for other, told in among.items())
            top = tuple((other, value) for rank, other, value in ranked if rank <= self._most)
            yield Chosen(token, among[token].logprob, top)
