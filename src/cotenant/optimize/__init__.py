"""Variants of a version: made, compared with it, measured beside it, kept or refused.

1. Rows that a candidate was made with are never rows that it is judged by (``rows``).
2. It is judged by what it may lose at most, not by what it lost (``bounds``, ``comparing``).
3. How fast it is was measured on this box, in turns with the original (``timing``).
4. What is not better in anything is refused, and says why (``choosing``).
5. Nothing half-written is ever seen, and nothing serves without its owner's word (``writing``).
6. The version itself is only read; if it changes meanwhile nothing is written (``running``).
"""
