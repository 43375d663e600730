"""The pages on one of the node's HTTP ports: routes of the application that is there.

Pages come from the server whole and need no script. All that is sent says what a browser may do
with it; nothing comes from another origin, and no token stands in a URL.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final
from urllib.parse import quote

import msgspec
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from cotenant.domain.errors import CotenantError, Forbidden, InvalidRequest, NotFound, TooLarge
from cotenant.domain.port import ModelMeta, NodePort
from cotenant.serving.bodies import BodyReader, Receive, Scope, Send, parse_head
from cotenant.serving.failures import FAILURES_S
from cotenant.serving.intake import Intake
from cotenant.serving.refusals import HTTP_STATUS, as_refused, error_status
from cotenant.serving.web import form, pages
from cotenant.serving.web.files import MOUNT, Files
from cotenant.serving.web.frame import REFRESH_S, Page, rendered
from cotenant.serving.web.html import Html, join, tag
from cotenant.serving.web.jobpages import confirm_page, job_page, jobs_page
from cotenant.serving.web.logtail import tail
from cotenant.serving.web.look import Look, Row, look
from cotenant.serving.web.session import Door, TooMany
from cotenant.serving.web.stream import Stream
from cotenant.serving.web.studied import Studied
from cotenant.serving.web.studies import StudyFailed
from cotenant.serving.web.trying import Tried, aside, attempt
from cotenant.serving.web.visitors import Visitor

log = logging.getLogger("cotenant.serving")

Handler = Callable[[Request], Awaitable[Response]]

LOGIN: Final = "/dashboard/login"
MOST_FORM_BYTES: Final = 2**20

HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "x-content-type-options": "nosniff",
    # With no-referrer browsers would send forms with the origin "null".
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Web:
    """See the module's text. ``stream`` and ``studied`` may be others' as well; they end by
    themselves as little as what they serve, so ``close`` it before the server stops."""

    def __init__(
        self, node: NodePort, intake: Intake, door: Door, stream: Stream, studied: Studied
    ) -> None:
        self._node = node
        self._intake = intake
        self._bodies = BodyReader(intake.limits, intake.budget)
        self._door = door
        self._files = Files()
        self._studied = studied
        self._turns = asyncio.Lock()
        self.stream = stream

    @staticmethod
    def owns(path: str) -> bool:
        """Whether a path is a page's, which sees to who may have it by itself."""
        return path in ("/", "/dashboard") or path.startswith("/dashboard/")

    def routes(self) -> list[BaseRoute]:
        """All of them."""
        service, job = "/dashboard/services/{name}", "/dashboard/jobs/{job}"
        inside = [
            ("/", self._now, "GET"),
            ("/dashboard", self._to_first, "GET"),
            ("/dashboard/services", self._services, "GET"),
            (service + "/try", self._try, "POST"),
            (service, self._service, "GET"),
            ("/dashboard/jobs", self._jobs, "GET"),
            (job, self._job, "GET"),
            (f"{job}/hold", self._order(self._node.hold_job), "POST"),
            (f"{job}/resume", self._order(self._node.resume_job), "POST"),
            (f"{job}/cancel", self._confirm, "GET"),
            (f"{job}/cancel", self._order(self._node.cancel_job), "POST"),
            ("/dashboard/decisions", self._decisions, "GET"),
            ("/dashboard/what-if", self._what_if, "GET"),
            ("/dashboard/what-if", self._compare, "POST"),
            ("/dashboard/logout", self._logout, "POST"),
        ]
        return [
            Route(LOGIN, self._guarded(self._login_form, inside=False)),
            Route(LOGIN, self._guarded(self._login, inside=False), methods=["POST"]),
            Route(MOUNT + "{name}", self._guarded(self._file, inside=False)),
            Route("/dashboard/events", self._Events(self)),
            *(Route(path, self._guarded(do), methods=[how]) for path, do, how in inside),
            Route("/dashboard/{rest:path}", self._guarded(self._nothing)),
        ]

    async def close(self) -> None:
        """End streams and studies."""
        await self.stream.close()
        await self._studied.close()

    # --- who may have what ------------------------------------------------------------------

    def _guarded(self, handler: Handler, inside: bool = True) -> Handler:
        """A handler behind the door. ``inside``: for those only who are signed in."""

        async def handle(request: Request) -> Response:
            response = self._turned_away(request, inside)
            if response is None:
                await self._turn()
                try:
                    response = await handler(request)
                except CotenantError as error:
                    response = self._failure(request, error)
            for name, value in HEADERS.items():
                response.headers[name] = value
            response.headers.setdefault("cache-control", "no-store")
            return response

        return handle

    async def _turn(self) -> None:
        """One page at a time of all that were asked for at once: inferences go in between."""
        async with self._turns:
            await asyncio.sleep(0)

    def _turned_away(self, request: Request, inside: bool) -> Response | None:
        why = self._door.wrong(request)
        if why is not None:
            return self._page(_plain("Not from here", why), 403)
        if not inside or self._door.visitor(request) is not None:
            return None
        if request.method in ("GET", "HEAD"):
            return RedirectResponse(LOGIN, 303)
        return self._page(_plain("Signed out", "Sign in again, then send it again."), 401)

    class _Events:
        """The stream behind the same door. An application, so that it can send as it goes."""

        def __init__(self, web: Web) -> None:
            self._web = web

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            request, door = Request(scope), self._web._door
            if request.method != "GET" or door.wrong(request):
                await Response("not from here\n", 403)(scope, receive, send)
            elif door.visitor(request) is None:
                await Response("sign in\n", 401)(scope, receive, send)
            else:
                await self._web.stream.serve(
                    receive, send, lambda: door.visitor(request) is not None
                )

    def _visitor(self, request: Request) -> Visitor:
        """Who asks for what is inside."""
        visitor = self._door.visitor(request)
        if visitor is None:  # since the door was passed
            raise NotFound("you are signed out; sign in again")
        return visitor

    async def _login_form(self, request: Request) -> Response:
        if self._door.visitor(request) is not None:
            return RedirectResponse("/", 303)
        return self._page(self._login_page(""))

    async def _login(self, request: Request) -> Response:
        given = await self._form(request)
        response = RedirectResponse("/", 303)
        try:
            if self._door.sign_in(given.get("token", ""), request, response):
                return response
        except TooMany:
            said = f"Too many wrong tokens. Try again in {FAILURES_S:.0f} seconds."
            slow = self._page(self._login_page(said), 429)
            slow.headers["retry-after"] = f"{FAILURES_S:.0f}"
            return slow
        return self._page(self._login_page("That token does not open these pages."), 403)

    def _login_page(self, problem: str) -> Page:
        return pages.login_page(LOGIN, self._door.label, problem)

    async def _logout(self, request: Request) -> Response:
        response = RedirectResponse(LOGIN, 303)
        self._door.sign_out(request, response)
        return response

    # --- pages ------------------------------------------------------------------------------

    async def _now(self, request: Request) -> Response:
        return self._live(request, pages.now_page(look(self._node)))

    async def _to_first(self, _: Request) -> Response:
        return RedirectResponse("/", 303)

    async def _services(self, request: Request) -> Response:
        return self._live(request, pages.services_page(look(self._node)))

    async def _service(self, request: Request) -> Response:
        return self._live(request, self._about(request, None))

    async def _try(self, request: Request) -> Response:
        if not self._visitor(request).infers:
            raise InvalidRequest("models are asked at the node's own port")
        given = (await self._form(request)).get("input", "")
        found = _named(look(self._node), "services", "name", request.path_params["name"])
        tried = await attempt(self._node, self._intake, str(found["name"]), given)
        if "application/json" in request.headers.get("accept", ""):
            told = {"headline": tried.headline, "text": tried.text}
            return Response(msgspec.json.encode(told), media_type="application/json")
        return self._page(self._about(request, tried))

    def _about(self, request: Request, tried: Tried | None) -> Page:
        name: str = request.path_params["name"]
        found = look(self._node)
        service = _named(found, "services", "name", name)
        versions = [entry for entry in self._node.index() if entry.name == name]
        asking = pages.trying(name, self._meta(name), tried)
        infers = self._visitor(request).infers
        return pages.service_page(found, service, versions, asking if infers else None)

    def _meta(self, name: str) -> ModelMeta | None:
        try:
            return self._node.metadata(name)
        except CotenantError:
            return None

    async def _jobs(self, request: Request) -> Response:
        return self._live(request, jobs_page(look(self._node), self._visitor(request).controls))

    async def _job(self, request: Request) -> Response:
        found = look(self._node)
        job = _named(found, "jobs", "id", request.path_params["job"])
        log_text = await asyncio.to_thread(tail, self._node.job_log_path(str(job["id"])))
        page = job_page(found, job, log_text, self._visitor(request).controls)
        return self._live(request, page)

    async def _confirm(self, request: Request) -> Response:
        self._require_control(request)
        job = _named(look(self._node), "jobs", "id", request.path_params["job"])
        return self._page(confirm_page(job))

    def _order(self, do: Callable[[str], str]) -> Handler:
        """What a button does to a job, and then the job's page."""

        async def handle(request: Request) -> Response:
            visitor = self._require_control(request)
            id = do(_named(look(self._node), "jobs", "id", request.path_params["job"])["id"])
            what = request.url.path.rpartition("/")[2]
            who = visitor.token.name if visitor.token else ""
            log.info("%s by the dashboard", what, extra={"job": id, "token": who})
            return RedirectResponse(f"/dashboard/jobs/{quote(id, safe='')}", 303)

        return handle

    def _require_control(self, request: Request) -> Visitor:
        visitor = self._visitor(request)
        if not visitor.controls:
            raise Forbidden("jobs are held, resumed and cancelled by who has the scope control")
        return visitor

    async def _decisions(self, _: Request) -> Response:
        return self._page(await self._studied.decisions(look(self._node)))

    async def _what_if(self, _: Request) -> Response:
        return self._page(self._studied.what_if(look(self._node)))

    async def _compare(self, request: Request) -> Response:
        given = await self._form(request)
        try:
            self._studied.compare(given.get("policy", ""), given.get("span", ""))
        except StudyFailed as error:
            return self._page(self._studied.what_if(look(self._node), str(error)), 400)
        return RedirectResponse("/dashboard/what-if", 303)

    async def _file(self, request: Request) -> Response:
        found = self._files.get(request.path_params["name"])
        if found is None:
            raise NotFound("no such file; load the page again")
        forever = {"cache-control": "public, max-age=31536000, immutable"}
        return Response(found.body, headers=forever, media_type=found.media_type)

    async def _nothing(self, _: Request) -> Response:
        raise NotFound("there is no such page")

    # --- answers ----------------------------------------------------------------------------

    def _live(self, request: Request, page: Page) -> Response:
        """A page that loads itself again if its URL says so."""
        if request.query_params.get("refresh") == str(REFRESH_S):
            page.refresh = REFRESH_S
        return self._page(page)

    def _page(self, page: Page, status: int = 200) -> Response:
        body = rendered(page, self._files, signs_out=self._door.locked)
        return Response(body, status, media_type="text/html")

    def _failure(self, request: Request, error: CotenantError) -> Response:
        refused = as_refused(error)
        status = HTTP_STATUS[refused.refusal] if refused else error_status(error)
        if isinstance(error, Forbidden):
            status = 403
        if status >= 500 and not refused:
            log.error("%s failed inside the server", request.url.path, exc_info=error)
        return self._page(_plain("Not found" if status == 404 else "Not done", str(error)), status)

    async def _form(self, request: Request) -> dict[str, str]:
        """The fields of a form; raises InvalidRequest, TooLarge."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != form.MEDIA_TYPE:
            raise InvalidRequest(f"a form is sent as {form.MEDIA_TYPE}")
        head = parse_head(request.scope["headers"])
        if head.content_length > MOST_FORM_BYTES:
            raise TooLarge(f"at most {MOST_FORM_BYTES} bytes are accepted in a form")
        body, held = await self._bodies.read(request.receive, head, MOST_FORM_BYTES)
        self._intake.budget.release(held)
        return await aside(len(body), partial(form.fields, body))


def _named(found: Look, kind: str, key: str, name: str) -> Row:
    """A row of the status; raises NotFound."""
    for row in found.rows(kind):
        if row.get(key) == name:
            return row
    raise NotFound(f"there is no {name!r} among this node's {kind}")


def _plain(title: str, text: str) -> Page:
    """A page that only says something."""
    return Page(title, "", join([tag("p", text), _home()]), 0, live=False)


def _home() -> Html:
    return tag("p", tag("a", "To the first page", href="/"))
