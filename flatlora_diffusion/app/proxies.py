"""Proxies that the environment names: gradio asks its own page for an answer, and must not ask a proxy."""

from __future__ import annotations

import os
from urllib.request import getproxies

from flatlora_diffusion.common.errors import UserError

_OWN = ("127.0.0.1", "localhost", "::1")


def keep_own_page_off_proxies(host: str) -> None:
    """Add this machine to NO_PROXY where there are proxies; to be called before gradio is imported.

    Args:
        host: Address that the page is served on.

    Raises:
        UserError: A proxy is one that gradio's client can't use; it would fail when it is imported.
    """
    proxies = getproxies()
    without = [name for name in proxies.pop("no", "").split(",") if name.strip()]
    if not proxies or "*" in without:
        return
    for kind, address in proxies.items():
        _check(kind, address)
    own = [*_OWN] if host in ("0.0.0.0", "::") else [*_OWN, host]
    named = ",".join(dict.fromkeys([*without, *own]))
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = named


def _check(kind: str, address: str) -> None:
    import httpx  # slow, and only needed where there is a proxy

    try:
        httpx.HTTPTransport(proxy=httpx.Proxy(address if "://" in address else f"http://{address}")).close()
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        variable = next((name for name in os.environ if name.lower() == f"{kind}_proxy"), f"{kind} proxy")
        scheme = address.partition("://")[0] if "://" in address else "this"
        # The address itself may hold a password.
        reason = "needs pip install 'httpx[socks]'" if isinstance(error, ImportError) else "is not known here"
        raise UserError(
            f"{variable}: a proxy of the kind {scheme} {reason}; name an http:// or socks5:// one, unset it, "
            "or start with NO_PROXY=*"
        ) from error
