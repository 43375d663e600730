"""Language models: the pure core (``blocks``, ``sequence``, ``iteration``, ``costs``, ``lookup``),
and beside it ``sampler``, ``stops`` and ``gguf``.

The core knows no clock, no thread and no engine. ``docs/llm.md`` explains it.
"""
