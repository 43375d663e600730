"""Engines for language models: our own on the CPU, and vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cotenant.domain.device import CUDA_SUBSETS
from cotenant.domain.errors import ModelError
from cotenant.domain.port import Language
from cotenant.engines.base import EngineKind, Opening, TurnEngine

SAFETENSORS: Final = (".safetensors", ".safetensors.index.json")


class Llm:
    """``engines.llm.engine``."""

    name = "llm"
    suffixes = (".gguf", *SAFETENSORS)
    rank = 20
    drafts = True

    def refuses(self, opening: Opening) -> str:
        if opening.target.on_cpu:
            return ""
        return (
            "it runs on the CPU alone; let the service run there (kinds: [cpu]), or say "
            "engine: vllm where the model is in safetensors"
        )

    def open(self, opening: Opening) -> TurnEngine:
        try:
            from cotenant.engines.llm.engine import LlmEngine
        except ImportError as error:
            needs = "language models need the extra llm: pip install 'cotenant[llm]'"
            raise ModelError(f"{needs} ({error})") from error
        settings = opening.settings
        return LlmEngine(
            opening.path, opening.units, opening.kv, settings.exactness, settings.draft
        )

    def language(self, path: Path) -> Language:
        from cotenant.engines.llm.language import LlmLanguage

        return LlmLanguage(path)


class Vllm:
    """``engines.llm.vllm``; only where it is asked for."""

    name = "vllm"
    suffixes = SAFETENSORS
    rank = 90
    drafts = False

    def refuses(self, opening: Opening) -> str:
        if opening.settings.engine != self.name:
            return "it is used if engine: vllm says so"
        if opening.target.processor.startswith(CUDA_SUBSETS):
            return (
                "it computes on all of a GPU, and this one is divided in subsets; serve it on one "
                "without (subsets: false)"
            )
        return ""

    def open(self, opening: Opening) -> TurnEngine:
        try:
            from cotenant.engines.llm.vllm import VllmEngine

            return VllmEngine(opening.path, opening.kv)
        except ImportError as error:
            needs = "engine: vllm needs the extra vllm: pip install 'cotenant[vllm]'"
            raise ModelError(f"{needs} ({error})") from error


LLM: Final[EngineKind] = Llm()
VLLM: Final[EngineKind] = Vllm()
