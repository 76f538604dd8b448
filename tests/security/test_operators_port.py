"""The operator's port: no path of it, ours or Flower's, answers without its token."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from server.doors import PATHS
from tests.security.coordinator import TOKEN, Up, real_coordinator


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with real_coordinator(tmp_path_factory.mktemp("admin")) as made:
        yield made


def routes(up: Up) -> list[tuple[str, str]]:
    """Every path and method that Flower's own application knows, whatever it is for."""
    app = up.flower._admin._server.config.app._app
    found = [("GET", route.path) for route in app.routes if hasattr(route, "path")]
    for path, methods in app.openapi()["paths"].items():
        found += [(method.upper(), path) for method in methods]
    return found


def test_flower_knows_paths_that_would_steer_the_coordinator(up):
    """Else the tests below would try nothing."""
    paths = {path for _, path in routes(up)}
    assert any("/control/" in path for path in paths)
    assert any("register" in path for path in paths)
    assert len(paths) > 30


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": f"Bearer {TOKEN[:-1]}"},
        {"authorization": f"Bearer {TOKEN[::-1]}"},
        {"cookie": f"token={TOKEN}"},
        {"x-token": TOKEN, "flwr-account-access-token": TOKEN},
    ],
    ids=["none", "shorter", "other", "cookie", "elsewhere"],
)
def test_no_path_at_all_answers_without_the_token(up, headers):
    base = f"http://127.0.0.1:{up.flower.admin_port}"
    with httpx.Client(base_url=base, headers=headers) as web:
        for method, path in routes(up):
            answer = web.request(method, path)
            assert (answer.status_code, answer.content) == (401, b""), (method, path)


def test_control_with_the_token_the_same_paths_are_reached(up):
    base = f"http://127.0.0.1:{up.flower.admin_port}"
    with httpx.Client(base_url=base, headers={"authorization": f"Bearer {TOKEN}"}) as web:
        reached = [
            web.request(*route).status_code for route in routes(up) if "stream" not in route[1]
        ]
    assert sum(status != 401 for status in reached) > len(reached) // 2


def test_in_public_the_token_opens_nothing(up):
    import ssl

    context = ssl.create_default_context(cafile=str(up.ca))
    with httpx.Client(
        base_url=f"https://127.0.0.1:{up.flower.public_port}",
        verify=context,
        headers={"authorization": f"Bearer {TOKEN}"},
    ) as web:
        for method, path in routes(up):
            answer = web.request(method, path)
            allowed = {400, 401, 404, 412, 415} if path in PATHS and method == "POST" else {404}
            assert answer.status_code in allowed, (method, path)
