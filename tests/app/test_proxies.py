import os

import pytest

from flatlora_diffusion.app.proxies import keep_own_page_off_proxies
from flatlora_diffusion.common.errors import UserError


@pytest.fixture(autouse=True)
def without_proxies(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in ("NO_PROXY", "no_proxy"):  # what is set below goes again
        monkeypatch.setenv(name, "")


def test_without_proxies_nothing_changes():
    keep_own_page_off_proxies("127.0.0.1")
    assert os.environ["NO_PROXY"] == ""


@pytest.mark.parametrize("name", ["http_proxy", "HTTPS_PROXY", "all_proxy"])
@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "127.0.0.1:9", "http://me:secret@p.example:3128"])
def test_the_own_page_is_asked_for_directly(monkeypatch, name, address):
    monkeypatch.setenv(name, address)
    monkeypatch.setenv("no_proxy", "intern.example")
    keep_own_page_off_proxies("192.168.1.7")
    assert os.environ["NO_PROXY"] == "intern.example,127.0.0.1,localhost,::1,192.168.1.7"
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"]
    keep_own_page_off_proxies("0.0.0.0")
    assert "0.0.0.0" not in os.environ["NO_PROXY"]


@pytest.mark.parametrize(
    "address", ["socks://me:secret@127.0.0.1:7891/", "ftp://127.0.0.1", "http://127.0.0.1:port"]
)
def test_a_proxy_that_cannot_be_used_is_named_with_the_way_out(monkeypatch, address):
    monkeypatch.setenv("ALL_PROXY", address)
    with pytest.raises(
        UserError, match=r"^ALL_PROXY: a proxy of the kind .* or start with NO_PROXY=\*$"
    ) as refused:
        keep_own_page_off_proxies("127.0.0.1")
    assert "secret" not in str(refused.value)
    monkeypatch.setenv("no_proxy", "*")
    keep_own_page_off_proxies("127.0.0.1")
