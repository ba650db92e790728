"""What is turned away before gradio sees it: unknown hosts, other sites, uploads, and guessed passwords."""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections import deque
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

WRONG_PASSWORDS = 10
"""So many in `PER_SECONDS` seconds from one address."""
PER_SECONDS = 60.0

_REMEMBERED = 10_000  # addresses; more at once are an attack, and the oldest are forgotten
_API = "/gradio_api/"
# All that the page itself and programs post. Uploads, recordings and generated code are none of it.
_POSTED = ("/login", *(_API + route for route in ("queue/join", "run/", "api/", "call/", "cancel", "reset")))
_CLOSED = (_API + "deep_link", "/deep_link")  # it would keep a visitor's fields on the disk


class KnownHosts:
    """Names that the page may be asked for under.

    A page of another site can point a name of its own at this machine, and so become "the same origin" as
    far as a browser knows (DNS rebinding). Such an attack needs a name: addresses in numbers are no danger.

    Args:
        host: Address or name that the page is served on.
        more: Names that a reverse proxy has, say.
    """

    def __init__(self, host: str = "127.0.0.1", more: Iterable[str] = ()) -> None:
        own = socket.gethostname().lower()
        names = ["localhost", host.lower(), own, f"{own}.local", *(name.lower() for name in more)]
        names += os.environ.get("SPACE_HOST", "").lower().split(",")  # set where Hugging Face runs a Space
        self._names = {name for name in names if name}

    def add(self, name: str) -> None:
        """Know one more."""
        self._names.add(name.lower())

    def __contains__(self, header: object) -> bool:
        """Whether the value of a Host header, with or without a port, is one of them."""
        name = str(header).strip().lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        elif name.count(":") == 1:
            name = name.partition(":")[0]
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name.rstrip(".") in self._names
        return True


class Guard:
    """ASGI middleware around gradio's application.

    Args:
        app: What it guards.
        hosts: That it is known by.
    """

    def __init__(self, app: ASGIApp, hosts: KnownHosts) -> None:
        self._app = app
        self._hosts = hosts
        self._wrong: dict[str, deque[float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is turned away, hand on others."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = self._refusal(scope)
        if refused:
            await refused(scope, receive, send)
        elif scope["method"] == "POST" and scope["path"].rstrip("/") == "/login":
            await self._log_in(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers, path = Headers(scope=scope), scope["path"]
        # Without the header a request isn't a browser's, which always sends it.
        if headers.get("host", "localhost") not in self._hosts:
            return _told(
                403, "This page isn't known by that name; where it runs, --known_host NAME makes it known."
            )
        if path.startswith(_CLOSED):
            return _told(403, "This page has no such part.")
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        if not path.startswith(_POSTED):
            return _told(403, "Nothing can be uploaded to this page.")
        if headers.get("sec-fetch-site") == "cross-site":
            return _told(403, "Another site can't use this page.")
        return None

    async def _log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        address = (scope.get("client") or ("",))[0]
        now = time.monotonic()
        tries = self._wrong.pop(address, deque())
        while tries and now - tries[0] > PER_SECONDS:
            tries.popleft()
        self._wrong[address] = tries  # the last in the order
        while len(self._wrong) > _REMEMBERED:
            del self._wrong[next(iter(self._wrong))]
        if len(tries) >= WRONG_PASSWORDS:
            wait = max(1, round(PER_SECONDS - (now - tries[0])))
            told = _told(429, f"Too many wrong passwords. Try again in {wait} seconds.")
            told.headers["Retry-After"] = str(wait)
            await told(scope, receive, send)
            return
        tries.append(now)  # counted first: many may come at once

        async def right_is_not_counted(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400 and now in tries:
                tries.remove(now)
            await send(message)

        await self._app(scope, receive, right_is_not_counted)


def _told(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status)
