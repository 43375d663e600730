"""The dashboard's pure parts: markup that escapes by itself, sessions, logs, files."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import Response

from cotenant.cli.studies import POLICIES as OFFERED
from cotenant.domain.errors import InvalidRequest
from cotenant.domain.port import ModelMeta, TensorMeta
from cotenant.serving.failures import MOST_FAILURES
from cotenant.serving.web import form
from cotenant.serving.web.files import Files
from cotenant.serving.web.html import Html, constant, join, tag
from cotenant.serving.web.logtail import readable, tail
from cotenant.serving.web.pages import example
from cotenant.serving.web.session import LASTS_S, MOST_SESSIONS, Door, TooMany
from cotenant.serving.web.visitors import NodeKey
from cotenant.sim.policies import POLICIES

TOKEN = "a token of twenty characters"


# --- markup -----------------------------------------------------------------------------------


def test_all_text_and_all_attributes_are_escaped() -> None:
    hostile = "</p><script>alert('1')</script>\"&"
    made = str(tag("p", hostile, tag("b", "x"), title=hostile))
    assert "<script" not in made and "</p><" not in made.removesuffix("</p>")
    assert made.count('"') == 2 and "<b>x</b>" in made


def test_nothing_invisible_gets_into_a_page() -> None:
    made = str(tag("p", "a\x00b\x1b[31m\N{RIGHT-TO-LEFT OVERRIDE}c"))
    assert made.isprintable() and "b" in made


def test_markup_is_not_made_of_strings() -> None:
    with pytest.raises(AssertionError):
        Html("<b>", object())
    for wrong in ({"style": "x"}, {"onclick": "x"}, {"A b": "x"}):
        with pytest.raises(AssertionError):
            tag("p", **wrong)
    assert str(join([constant("<b>"), "<b>", None, 1])) == "<b>&lt;b&gt;1"


# --- files ------------------------------------------------------------------------------------


def test_a_file_is_found_under_the_name_that_its_content_gives_it() -> None:
    files = Files()
    for name in ("dashboard.js", "uplot.min.js", "dashboard.css", "uplot.min.css", "icon.svg"):
        found = files.get(files.url(name).rpartition("/")[2])
        assert found is not None and found.body
    assert files.get("dashboard.js") is None and files.get("../app.py") is None


def test_our_own_script_is_small_and_the_licence_of_the_other_is_there() -> None:
    static = Path(__file__).parents[2] / "src/cotenant/serving/web/static"
    assert (static / "dashboard.js").stat().st_size < 20_000
    assert "MIT" in (static / "uplot.LICENSE").read_text()


# --- who may see it ------------------------------------------------------------------------------


def request(method: str = "GET", **headers: str) -> Request:
    given = {"host": "localhost:8000", **{k.replace("_", "-"): v for k, v in headers.items()}}
    raw = [(k.encode(), v.encode()) for k, v in given.items()]
    return Request({"type": "http", "method": method, "path": "/", "headers": raw})


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "127.1.2.3", "LOCALHOST:1"]
)
def test_without_a_token_names_of_this_machine_are_answered(host: str) -> None:
    assert Door(None, "127.0.0.1").wrong(request(host=host)) is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.evil.example",
        "localhost.evil.example",
        "",
        "[::1",
        "10.0.0.1",
        "a@localhost@b",
    ],
)
def test_without_a_token_no_other_name_is(host: str) -> None:
    assert Door(None, "127.0.0.1").wrong(request(host=host))


def test_with_a_token_the_name_is_free() -> None:
    assert Door(NodeKey(TOKEN), "0.0.0.0").wrong(request(host="box.example")) is None


@pytest.mark.parametrize("origin", ["http://localhost:8000", "https://localhost:8000"])
def test_a_form_of_ones_own_page_is_taken(origin: str) -> None:
    assert Door(None, "127.0.0.1").wrong(request("POST", origin=origin)) is None


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "null"},
        {"origin": "http://evil.example"},
        {"origin": "http://localhost:8001"},
        {"origin": "http://localhost"},
        {"origin": "file://localhost:8000"},
        {"origin": "http://localhost:8000", "sec_fetch_site": "cross-site"},
    ],
)
def test_a_form_of_another_page_is_not(headers: dict[str, str]) -> None:
    assert Door(NodeKey(TOKEN), "127.0.0.1").wrong(request("POST", **headers))


def test_another_site_may_link_here_and_do_nothing_else() -> None:
    door = Door(NodeKey(TOKEN), "127.0.0.1")
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert door.wrong(request(**link)) is None
    assert door.wrong(request(sec_fetch_site="cross-site", sec_fetch_mode="no-cors"))
    assert door.wrong(request(origin="http://evil.example"))


def is_open(door: Door, asked: Request) -> bool:
    return door.visitor(asked) is not None


def test_a_form_over_tls_is_of_a_page_over_tls() -> None:
    door = Door(NodeKey(TOKEN), "0.0.0.0", tls=True)
    assert door.wrong(request("POST", origin="http://localhost:8000"))
    assert door.wrong(request("POST", origin="https://localhost:8000")) is None


def test_a_session_is_of_the_host_that_it_was_made_under() -> None:
    door = Door(NodeKey(TOKEN), "0.0.0.0")
    cookie = signed_in(door).partition(";")[0]
    assert is_open(door, request(cookie=cookie))
    assert not is_open(door, request(cookie=cookie, host="localhost:8001"))


def test_a_cookie_over_tls_is_sent_over_tls_alone() -> None:
    assert "secure" not in signed_in(Door(NodeKey(TOKEN), "0.0.0.0")).lower()
    assert "secure" in signed_in(Door(NodeKey(TOKEN), "0.0.0.0", tls=True)).lower()


def signed_in(door: Door) -> str:
    response = Response()
    assert door.sign_in(TOKEN, request(), response)
    return response.headers["set-cookie"]


def test_a_session_is_not_the_token_and_ends() -> None:
    now = 0.0
    door = Door(NodeKey(TOKEN), "0.0.0.0", clock=lambda: now)
    assert not is_open(door, request())
    cookie = signed_in(door)
    assert "httponly" in cookie.lower() and "samesite=strict" in cookie.lower()
    assert TOKEN not in cookie
    name = cookie.partition(";")[0]
    assert is_open(door, request(cookie=name))
    assert not is_open(door, request(cookie=name + "x"))
    door.sign_out(request(cookie=name), Response())
    assert not is_open(door, request(cookie=name))
    late = signed_in(door).partition(";")[0]
    now = LASTS_S + 1
    assert not is_open(door, request(cookie=late))


def test_who_has_the_token_needs_no_session() -> None:
    door = Door(NodeKey(TOKEN), "0.0.0.0")
    assert is_open(door, request(authorization=f"Bearer {TOKEN}"))
    assert not is_open(door, request(authorization="Bearer something else"))


def test_sessions_are_bounded() -> None:
    door = Door(NodeKey(TOKEN), "0.0.0.0")
    cookies = [signed_in(door).partition(";")[0] for _ in range(MOST_SESSIONS + 3)]
    open_ones = [is_open(door, request(cookie=cookie)) for cookie in cookies]
    assert open_ones == [False] * 3 + [True] * MOST_SESSIONS


def test_tokens_are_not_guessed_in_a_row() -> None:
    now = 0.0
    door = Door(NodeKey(TOKEN), "0.0.0.0", clock=lambda: now)
    for guess in range(MOST_FAILURES):
        assert not door.sign_in(str(guess), request(), Response())
    with pytest.raises(TooMany):
        door.sign_in(TOKEN, request(), Response())
    now = 3600.0
    assert door.sign_in(TOKEN, request(), Response())


# --- logs -------------------------------------------------------------------------------------


def test_the_end_of_a_log_is_whole_lines_of_both_files(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert tail(str(path)) == ""
    (tmp_path / "log.1").write_text("".join(f"old {n}\n" for n in range(100)))
    path.write_text("new\n")
    assert tail(str(path), 50).splitlines()[-2:] == ["old 99", "new"]
    assert all(line.split()[0] in ("old", "new") for line in tail(str(path), 50).splitlines())
    path.write_text("".join(f"new {n}\n" for n in range(100)))
    assert tail(str(path), 50).splitlines()[-1] == "new 99"


def test_a_log_that_is_something_else_is_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hush")
    (tmp_path / "link").symlink_to(secret)
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", "."):
        assert tail(str(tmp_path / name)) == ""


def test_what_only_a_terminal_understands_is_left_out() -> None:
    said = "\x1b[1;31mred\x1b[0m\n10 %\r20 %\r30 %\r\nend\x1b]0;title\x07"
    assert readable(said) == "red\n30 %\nend"


# --- forms --------------------------------------------------------------------------------------

PARTS = st.sampled_from(["%", "4", "e", "g", "+", "=", "&", "a", "%41", "%e4%b8", "%E4%B8%AD", "ä"])


@given(st.lists(PARTS, max_size=24).map("".join))
def test_a_form_is_read_as_the_standard_library_does(text: str) -> None:
    found = parse_qs(text, keep_blank_values=True)
    if len(text.split("&")) > form.MOST_FIELDS:
        return
    assert form.fields(text.encode()) == {name: values[0] for name, values in found.items()}


def test_a_form_has_so_many_fields_at_most() -> None:
    most = b"&".join(b"%d=x" % n for n in range(form.MOST_FIELDS))
    assert len(form.fields(most)) == form.MOST_FIELDS
    with pytest.raises(InvalidRequest):
        form.fields(most + b"&a=x")


# --- the rest -----------------------------------------------------------------------------------


def test_every_policy_that_is_offered_can_be_simulated() -> None:
    assert OFFERED.keys() <= POLICIES.keys()


def test_an_example_has_every_input_that_is_needed() -> None:
    x = TensorMeta("x", "FP32", (-1, 3))
    text = TensorMeta("text", "BYTES", (1,))
    large = TensorMeta("large", "INT64", (1000, 1000))
    more = TensorMeta("more", "FP32", (1,), optional=True)
    said = example(ModelMeta("m", ("1",), "onnx", (x, text, large, more), ()))
    assert '"data": [0, 0, 0]' in said and '"large"' in said and '"more"' not in said
    assert len(said) < 1000
    assert '"text"' in example(ModelMeta("m", ("1",), "llm", (text,), (), pieces=True))
