"""Which token comes next: greedy, drawn, with everything that a client may ask for."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.engines.llm.sampler import Sampling, choose
from cotenant.engines.llm.stops import Stops

CHANCES = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])
LOGITS = np.log(CHANCES).astype(np.float32)


def sampling(**how: Any) -> Sampling:
    return Sampling(**{"temperature": 1.0, "seed": 0} | how)


def drawn(count: int = 4000, **how: Any) -> Counter[int]:
    chosen = sampling(**how)
    return Counter(choose(LOGITS, chosen, at, {}).token for at in range(count))


def test_greedy_takes_the_likeliest() -> None:
    assert choose(LOGITS, sampling(temperature=0), 0, {}).token == 0


def test_draws_follow_the_probabilities() -> None:
    found = drawn()
    for token, chance in enumerate(CHANCES):
        assert found[token] / 4000 == pytest.approx(chance, abs=0.03)


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    first, other = (
        [choose(LOGITS, sampling(seed=seed), at, {}).token for at in range(50)] for seed in (7, 8)
    )
    assert first != other
    for at in reversed(range(50)):
        assert choose(LOGITS, sampling(seed=7), at, {1: 3}).token == first[at]


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.7}, {0, 1}),
        ({"top_p": 0.0}, {0}),
        ({"min_p": 0.4}, {0, 1}),
        ({"min_p": 0.4, "top_p": 0.65}, {0}),
        ({"min_p": 0.4, "temperature": 2.0}, {0, 1, 2}),
        ({"top_k": 4}, {0, 1, 2, 3}),
        ({"bias": {2: 100.0}}, {2}),
        ({"bias": {0: -100.0, 99: 5.0}}, {1, 2, 3, 4}),
    ],
)
def test_only_what_counts_is_drawn(how: dict[str, Any], kept: set[int]) -> None:
    assert set(drawn(600, **how)) == kept


def test_a_low_temperature_sharpens() -> None:
    assert drawn(500, temperature=0.1)[0] > 490


@pytest.mark.parametrize("how", [{"presence": 2.0}, {"frequency": 1.0}, {"repetition": 3.0}])
def test_what_was_said_is_less_likely(how: dict[str, Any]) -> None:
    greedy = sampling(temperature=0, **how)
    for logits in (LOGITS, LOGITS + 2):
        assert choose(logits, greedy, 0, {0: 2}).token == 1


def test_what_the_prompt_said_counts_for_repetition_alone() -> None:
    prompt = np.array([0], np.int64)
    repeats = sampling(temperature=0, repetition=3.0)
    present = sampling(temperature=0, presence=2.0)
    assert choose(LOGITS, repeats, 0, {}, prompt).token == 1
    assert choose(LOGITS, present, 0, {}, prompt).token == 0


def test_only_what_is_allowed_is_said() -> None:
    allowed = np.array([False, False, True, False, True])
    for at in range(50):
        assert choose(LOGITS, sampling(), at, {}, allowed=allowed).token in (2, 4)
    with pytest.raises(ValueError, match="allowed"):
        choose(LOGITS, sampling(), 0, {}, allowed=np.zeros(5, bool))
    with pytest.raises(ValueError, match="allowed"):
        choose(np.full(5, -np.inf, np.float32), sampling(), 0, {}, allowed=allowed)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_computes_no_numbers_says_nothing(temperature: float) -> None:
    one = LOGITS.copy()
    one[3] = np.nan
    for logits in (np.full(5, np.nan, np.float32), one):
        with pytest.raises(ValueError, match="NaN"):
            choose(logits, sampling(temperature=temperature, logprobs=2), 0, {})


def test_logprobs_are_the_models_own() -> None:
    told = sampling(temperature=0.5, logprobs=2, bias={3: 100.0})
    token, logprob, top = choose(LOGITS, told, 0, {})
    assert token == 3
    assert logprob == pytest.approx(math.log(0.0625), abs=1e-5)
    assert [t for t, _ in top] == [0, 1]
    assert choose(LOGITS, sampling(), 0, {}).top == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"top_k": -1},
        {"presence": 3.0},
        {"logprobs": 21},
        {"bias": {1: 101.0}},
    ],
)
def test_what_is_out_of_range_is_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    assert name in sampling(**wrong).problem()
    assert not sampling().problem()


# --- stop strings ---------------------------------------------------------------------------


def test_a_stop_string_across_pieces_ends_the_answer() -> None:
    found = Stops(["END", "\n\n"])
    assert [found.feed(piece) for piece in ("one E", "N", "Q two\n", "\nthree")] == [
        "one ",
        "",
        "ENQ two",
        "",
    ]
    assert found.stopped
    assert found.feed("more") == found.finish() == ""


def test_what_was_held_back_is_said_at_the_end() -> None:
    found = Stops(["END"])
    assert found.feed("the EN") == "the "
    assert found.finish() == "EN"


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_pieces_make_no_difference(text: str, stops: list[str]) -> None:
    whole, pieces = Stops(stops), Stops(stops)
    at_once = whole.feed(text)
    at_once += "" if whole.stopped else whole.finish()
    said = "".join(pieces.feed(letter) for letter in text)
    said += "" if pieces.stopped else pieces.finish()
    assert said == at_once
    assert pieces.stopped == whole.stopped == any(stop in text for stop in stops)
    assert not any(stop in said for stop in stops)
    assert text.startswith(said)
