"""One arm of ``benchmarks/llm.py``: llama.cpp, run by the interpreter of ``.venvs/llama.cpp``.

Reads the task as JSON from stdin and prints samples, or most likely tokens, as JSON. Tokens go in
by its batch interface, which is what its own server uses; the most likely token goes back in.
Nothing else is done.

``llama.py IN.gguf OUT.gguf`` writes a model anew as Q4_0, the kind of 4 bits that llama.cpp has its
fastest kernels for.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp as llama
import numpy as np


class Model:
    """A model and a context for so many sequences of so many tokens."""

    def __init__(self, task: dict[str, Any]) -> None:
        how = llama.llama_model_default_params()
        self._model = llama.llama_model_load_from_file(task["model"].encode(), how)
        if not self._model:
            raise SystemExit("llama.cpp cannot load the model")
        prompts, room = task["prompts"], task["room"]
        params = llama.llama_context_default_params()
        params.n_ctx = room * len(prompts)
        params.n_batch = params.n_ubatch = task["tokens"]
        params.n_seq_max = len(prompts)
        params.n_threads = params.n_threads_batch = task["threads"]
        params.kv_unified = task.get("unified", False)
        self._context = llama.llama_init_from_model(self._model, params)
        self.vocabulary = llama.llama_n_vocab(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(task["tokens"], 0, 1)

    def clear(self) -> None:
        """Forget all sequences."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)

    def compute(
        self, works: Sequence[tuple[int, int, Sequence[int]]], each: bool = False
    ) -> list[int]:
        """Works are (sequence, first position, tokens); the most likely token behind each of them,
        or behind each token."""
        batch, at, wanted = self._batch, 0, []
        for sequence, start, tokens in works:
            for offset, token in enumerate(tokens):
                batch.token[at] = token
                batch.pos[at] = start + offset
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = sequence
                batch.logits[at] = each or offset + 1 == len(tokens)
                if batch.logits[at]:
                    wanted.append(at)
                at += 1
        batch.n_tokens = at
        if llama.llama_decode(self._context, batch):
            raise SystemExit("llama.cpp refuses a batch")
        return [int(self._logits(index).argmax()) for index in wanted]

    def _logits(self, index: int) -> Any:
        found = llama.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(found, (self.vocabulary,))


def as_q4_0(source: str, target: str) -> None:
    """Rounds what was rounded before: for speed, not for answers."""
    how = llama.llama_model_quantize_default_params()
    how.ftype = llama.LLAMA_FTYPE_MOSTLY_Q4_0
    how.allow_requantize = True
    if llama.llama_model_quantize(source.encode(), target.encode(), how):
        raise SystemExit(f"llama.cpp cannot write {target}")


def read(model: Model, script: list[list[int]]) -> list[list[int]]:
    """The most likely token behind each token of some passages."""
    found = []
    for passage in script:
        model.clear()
        found.append(model.compute([(0, 0, passage)], each=True))
    return found


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(began: tuple[float, float]) -> tuple[float, float]:
    """Milliseconds by the clock, and of CPU time."""
    clock, cpu = _now()
    return (clock - began[0]) * 1e3, (cpu - began[1]) * 1e3


def main() -> None:
    """Measure, print."""
    if len(sys.argv) == 3:
        as_q4_0(sys.argv[1], sys.argv[2])
        return
    task = json.load(sys.stdin)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 2)  # what it says while it loads
    model = Model(task)
    if "script" in task:
        print(json.dumps(read(model, task["script"])))
        return
    prompts, steps = task["prompts"], task["steps"]
    samples: dict[str, list[tuple[float, float]]] = {"prefill": []}
    for _ in range(task["prefills"] + 1):
        model.clear()
        began = _now()
        model.compute([(0, 0, prompts[0])])
        samples["prefill"].append(_since(began))
    del samples["prefill"][0]
    for count in task["counts"]:
        model.clear()
        said = [model.compute([(row, 0, prompts[row])])[0] for row in range(count)]
        start = len(prompts[0])
        took = samples[f"at_{count}"] = []
        for step in range(steps):
            began = _now()
            said = model.compute([(row, start + step, [said[row]]) for row in range(count)])
            took.append(_since(began))
    system = llama.llama_print_system_info().decode()
    print(json.dumps({"samples": samples, "version": llama.__version__, "system": system}))


if __name__ == "__main__":
    main()
