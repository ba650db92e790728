"""What chats and other sites show of a link to the page: its own title, words and picture."""

from __future__ import annotations

import html
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_THEIRS = re.compile(rb'<meta\s+(?:property="og:|name="twitter:)[^>]*>\s*')


class Preview:
    """ASGI middleware that puts the page's own words in the place of gradio's.

    Args:
        app: Gradio's application.
        title: Of the page.
        description: A sentence.
        picture: Its path below the page's address.
    """

    def __init__(self, app: ASGIApp, title: str, description: str, picture: str) -> None:
        self._app = app
        self._title = title
        self._description = description
        self._picture = picture

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, and change the answer where it is the page."""
        if scope["type"] != "http" or scope["path"] != "/" or scope["method"] != "GET":
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def changed(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            assert start is not None
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            headers = MutableHeaders(raw=start["headers"])
            if headers.get("content-type", "").startswith("text/html"):
                body = self._own(body, scope)
                headers["content-length"] = str(len(body))
            await send(start)
            await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, changed)

    def _own(self, page: bytes, scope: Scope) -> bytes:
        headers = Headers(scope=scope)
        scheme = headers.get("x-forwarded-proto", scope["scheme"]).partition(",")[0]
        # Whoever shows a link wants the whole address of its picture.
        address = f"{scheme}://{headers.get('host', 'localhost')}{scope.get('root_path', '')}/"
        told = {
            "og:type": "website",
            "og:url": address,
            "og:title": self._title,
            "og:description": self._description,
            "og:image": address + self._picture,
        }
        own = "".join(
            f'<meta property="{name}" content="{html.escape(value)}" />' for name, value in told.items()
        )
        return _THEIRS.sub(b"", page).replace(b"<head>", b"<head>" + own.encode(), 1)
