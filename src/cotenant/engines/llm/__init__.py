"""Language models: the pure core (``blocks``, ``sequence``, ``iteration``, ``costs``, ``lookup``).

It knows no clock, no thread and no engine. ``docs/llm.md`` explains it.
"""
