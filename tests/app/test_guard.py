"""What is turned away before gradio sees it."""

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from flatlora_diffusion.app import guard
from flatlora_diffusion.app.guard import WRONG_PASSWORDS, Guard, KnownHosts


async def answer(request):
    if request.url.path.rstrip("/") != "/login":
        return PlainTextResponse("served")
    right = (await request.body()) == b"right"
    return PlainTextResponse("welcome" if right else "no", 200 if right else 400)


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setenv("SPACE_HOST", "me-mine.hf.space")
    hosts = KnownHosts("0.0.0.0", ["icons.example"])
    hosts.add("abc.gradio.live")
    routes = [Route("/{path:path}", answer, methods=["GET", "POST", "PUT"])]
    app = Starlette(routes=routes, middleware=[Middleware(Guard, hosts=hosts)])
    return TestClient(app, base_url="http://localhost:7860")


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost:7860", True),
        ("LOCALHOST", True),
        ("127.0.0.1:7860", True),
        ("[::1]:7860", True),
        ("192.168.1.7:80", True),
        ("icons.example", True),
        ("icons.example.:443", True),
        ("abc.gradio.live", True),
        ("me-mine.hf.space", True),
        ("evil.example", False),
        ("evil.example:7860", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
    ],
)
def test_only_known_hosts_are_served(client, host, known):
    got = client.get("/config", headers={"host": host})
    assert got.status_code == (200 if known else 403)
    assert known or "--known_host NAME" in got.json()["detail"]


@pytest.mark.parametrize(
    "path",
    ["upload", "upload/", "process_recording", "vibe-edit", "stream/x", "component_server", "undo-vibe-edit"],
)
def test_nothing_is_uploaded(client, path):
    got = client.post(f"/gradio_api/{path}", content=b"x")
    assert got.status_code == 403 and got.json() == {"detail": "Nothing can be uploaded to this page."}
    assert client.put("/gradio_api/queue/join/../upload", content=b"x").status_code == 403


def test_fields_are_not_kept_on_the_disk(client):
    assert client.get("/gradio_api/deep_link?session_hash=x").status_code == 403


def test_another_site_cannot_press_buttons(client):
    def post(site):
        return client.post("/gradio_api/queue/join", headers={"sec-fetch-site": site} if site else {})

    assert post("cross-site").status_code == 403
    assert [post(site).status_code for site in ("same-origin", "same-site", "none", None)] == [200] * 4
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200  # a link to the page


def test_passwords_are_not_guessed_for_long(client, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(guard.time, "monotonic", lambda: now)
    for _ in range(3):  # right ones don't count
        assert client.post("/login", content=b"right").status_code == 200
    for _ in range(WRONG_PASSWORDS):
        assert client.post("/login/", content=b"wrong").status_code == 400
    refused = client.post("/login", content=b"right")
    assert refused.status_code == 429 and refused.headers["retry-after"] == "60"
    assert refused.json() == {"detail": "Too many wrong passwords. Try again in 60 seconds."}
    assert client.get("/").status_code == 200  # who is in stays in
    now += 61
    assert client.post("/login", content=b"right").status_code == 200


def test_addresses_of_attackers_do_not_pile_up(client, monkeypatch):
    monkeypatch.setattr(guard, "_REMEMBERED", 2)
    app = client.app
    clients = [TestClient(app, base_url="http://localhost", client=(f"10.0.0.{n}", 1)) for n in range(4)]
    for one in clients:
        assert one.post("/login", content=b"wrong").status_code == 400
    built = app.middleware_stack
    while not isinstance(built, Guard):
        built = built.app
    assert list(built._wrong) == ["10.0.0.2", "10.0.0.3"]


def test_gradios_page_is_guarded():
    """In place: as `launch` is given it."""
    import gradio as gr

    from flatlora_diffusion.app.page import launch_settings
    from tests.browser import served

    with gr.Blocks() as page:
        gr.Textbox()
    with served(page, **launch_settings(), auth=("me", "secret")) as url:
        assert httpx.get(f"{url}config", headers={"host": "evil.example"}).status_code == 403
        wrong = {"username": "me", "password": "wrong"}
        codes = [httpx.post(f"{url}login", data=wrong).status_code for _ in range(WRONG_PASSWORDS + 1)]
        assert codes == [400] * WRONG_PASSWORDS + [429]
