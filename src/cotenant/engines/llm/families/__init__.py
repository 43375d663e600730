"""Families of models: how each one's files are read as a ``Decoder``. One file a family."""

from cotenant.engines.llm.families.base import Family, family
from cotenant.engines.llm.families.gemma import GEMMA, LATER_GEMMAS
from cotenant.engines.llm.families.idefics import IDEFICS
from cotenant.engines.llm.families.llama import LLAMA

FAMILIES: tuple[Family, ...] = (LLAMA, GEMMA, LATER_GEMMAS, IDEFICS)

__all__ = ["FAMILIES", "Family", "family"]
