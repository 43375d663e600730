"""What claims say to the driver, and what is refused of it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.domain.errors import InvalidRequest
from cotenant.domain.units import MS
from cotenant.kube.parameters import Parameters, merged, quantity, read
from tests.kube_fakes import says


def written(**parameters: Any) -> object:
    return says(**parameters)["opaque"]["parameters"]


def test_what_is_understood() -> None:
    found = read(written(guarantee=50, limit=80, memory="2Gi", objective="20ms"))
    assert found == Parameters(guarantee=50, limit=80, memory=2 * 2**30, objective=20 * MS)
    assert read(written()) == Parameters()


@pytest.mark.parametrize(
    "parameters",
    [
        {"garantee": 50},
        {"guarantee": 0},
        {"guarantee": 101},
        {"guarantee": 12.5},
        {"guarantee": "50"},
        {"guarantee": True},
        {"limit": -1},
        {"memory": "2 gigs"},
        {"memory": "-1Gi"},
        {"memory": "100m"},
        {"memory": "9e99"},
        {"objective": "-5ms"},
        {"objective": "0ms"},
        {"objective": "soon"},
        {"objective": 20},
        {"objective": "9" * 400 + "s"},
        {"objective": "2h"},
        {"kind": "Parameters"},
        {"apiVersion": "cotenant.dev/v2"},
    ],
)
def test_what_is_refused(parameters: dict[str, Any]) -> None:
    raw = {**says()["opaque"]["parameters"], **parameters}
    with pytest.raises(InvalidRequest):
        read(raw)


@pytest.mark.parametrize("raw", [None, "text", [], {}, {"guarantee": 50}, 7])
def test_what_is_no_parameters_is_refused(raw: object) -> None:
    with pytest.raises(InvalidRequest):
        read(raw)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    ["apiVersion", "kind", "guarantee", "limit", "memory", "objective", "other"]
                ),
                inner,
            )
        ),
    )
)
def test_whatever_it_is_it_is_understood_or_refused(raw: object) -> None:
    base = says()["opaque"]["parameters"]
    for tried in (raw, {**base, **raw} if isinstance(raw, dict) else raw):
        try:
            assert isinstance(read(tried), Parameters)
        except InvalidRequest as refused:
            assert str(refused)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("50", 50),
        (50, 50),
        ("1.5Gi", Fraction(3, 2) * 2**30),
        ("2k", 2000),
        ("100m", Fraction(1, 10)),
        ("2e3", 2000),
        ("2E", 2 * 10**18),
        ("1Ei", 2**60),
    ],
)
def test_quantities(text: str | int, value: Fraction) -> None:
    assert quantity(text) == value


def test_a_claim_has_the_last_word_and_the_class_fills_in() -> None:
    config = [
        says("FromClass", objective="100ms", memory="1Gi"),
        says("FromClaim", objective="20ms"),
    ]
    assert merged(config, "a") == Parameters(objective=20 * MS, memory=2**30)
    assert merged(config[::-1], "a") == merged(config, "a")


def test_configuration_is_for_the_requests_that_it_names() -> None:
    config = [says(requests=("a",), guarantee=50), says(requests=("b/large",), guarantee=20)]
    assert merged(config, "a/small").guarantee == 50
    assert merged(config, "b/large").guarantee == 20
    assert merged(config, "b/small").guarantee is None


def test_two_that_differ_for_one_request_are_refused() -> None:
    config = [says(guarantee=50), says(requests=("a",), guarantee=40)]
    assert merged(config, "b").guarantee == 50
    with pytest.raises(InvalidRequest):
        merged(config, "a")


def test_what_is_meant_for_other_drivers_is_theirs() -> None:
    other = {"source": "FromClaim", "opaque": {"driver": "gpu.example", "parameters": {"x": 1}}}
    assert merged([other], "a") == Parameters()
