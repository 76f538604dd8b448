"""How often a hospital, or somebody with its transport key, may call; over real TLS sockets."""

from __future__ import annotations

import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from client.app import shell
from client.link import LinkWorld
from common.world import SystemClock
from server.app import Pace
from server.doors import Quota, Wire
from tests.flower_node import TinyNode, public_line, transport_key
from tests.security.coordinator import Up, hospital_link, real_coordinator
from tests.server.test_flower_link import STEPS, Driver, Hospital, exchange, replies

MOST = 20
CALLS = 400
TIGHT = Wire(hold_s=0.2, calls_per_s=1.0, most_calls=MOST)
# Fewer than one question and its answer take.
THIN = Wire(hold_s=0.2, calls_per_s=20.0, most_calls=3)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    with real_coordinator(tmp_path / "up", TIGHT) as made:
        yield made


@pytest.fixture
def nodes(up: Up) -> Iterator[dict[str, TinyNode]]:
    made = {}
    for site in ("ash", "birch"):
        key = transport_key()
        up.flower.register(site, public_line(key))
        made[site] = TinyNode(up.flower.public_port, up.ca, key)
        made[site].activate()
    yield made
    for node in made.values():
        node.close()


def refused(call: Any) -> httpx.Response:
    """The first answer that is not a success, of a caller that calls and calls."""
    for _ in range(CALLS):
        try:
            assert call()
        except httpx.HTTPStatusError as error:
            return error.response
    raise AssertionError(f"{CALLS} calls were served")


def headers_of(node: TinyNode) -> tuple[str, dict[str, str]]:
    """The path and the signed headers of a heartbeat, which was served."""
    seen: list[httpx.Request] = []
    node.calls._client.event_hooks = {"request": [seen.append]}
    assert node.heartbeat()
    node.calls._client.event_hooks = {}
    kept = {k: v for k, v in seen[-1].headers.items() if k not in {"host", "content-length"}}
    return seen[-1].url.path, kept


def test_a_hospital_that_calls_too_often_is_told_to_wait_and_nobody_else(up, nodes):
    told = refused(nodes["ash"].heartbeat)
    assert (told.status_code, told.content) == (429, b"")
    assert 1 <= int(told.headers["retry-after"]) <= 2
    assert nodes["birch"].heartbeat()


def served(node: TinyNode) -> bool:
    """Whether a call is served; the only other answer is that it has to wait."""
    try:
        return node.heartbeat()
    except httpx.HTTPStatusError as error:
        if error.response.status_code != 429:
            raise
        return False


def test_after_the_wait_it_is_served_again(up, nodes):
    refused(nodes["ash"].heartbeat)
    tries = 0
    while not served(nodes["ash"]):
        tries += 1
        assert tries < CALLS, "never again"
        threading.Event().wait(0.05)


def test_the_quota_is_the_keys_whatever_connection_or_address_it_calls_from(up, nodes):
    """Somebody with the stolen transport key, on another machine."""
    node = nodes["ash"]
    refused(node.heartbeat)
    context = ssl.create_default_context(cafile=str(up.ca))
    thief = TinyNode(up.flower.public_port, up.ca, node.key)
    thief.node_id = node.node_id
    thief.calls._client.close()
    transport = httpx.HTTPTransport(verify=context, local_address="127.0.0.2")
    thief.calls._client = httpx.Client(transport=transport)
    with pytest.raises(httpx.HTTPStatusError) as told:
        thief.heartbeat()
    assert told.value.response.status_code == 429
    thief.close()


def forge(up: Up, node: TinyNode, address: str, said: str) -> Counter[int]:
    """What somebody at `address` hears who shows a key without having it, again and again.

    Where he `said` that he comes from has a number in it.
    """
    path, headers = headers_of(node)
    context = ssl.create_default_context(cafile=str(up.ca))
    transport = httpx.HTTPTransport(verify=context, local_address=address)
    url = f"https://127.0.0.1:{up.flower.public_port}{path}"
    statuses: Counter[int] = Counter()
    with httpx.Client(transport=transport) as web:
        for number in range(CALLS):
            told = {
                "flwr-timestamp": f"2026-01-01T00:00:00.{number:06d}+00:00",
                "x-forwarded-for": said.format(number % 250),
            }
            statuses[web.post(url, headers={**headers, **told}, content=b"").status_code] += 1
            if statuses[429]:
                break
    return statuses


def test_whoever_shows_a_key_that_is_not_his_uses_up_nothing_of_its_owner(up, nodes):
    """The public key is no secret."""
    statuses = forge(up, nodes["ash"], "127.0.0.2", "127.0.0.1")
    assert set(statuses) == {401, 429}, "control: the forger himself is held to the quota"
    assert nodes["ash"].heartbeat()


def test_where_somebody_says_that_he_comes_from_is_not_believed(up, nodes):
    statuses = forge(up, nodes["ash"], "127.0.0.1", "10.1.2.{}")
    assert set(statuses) == {401, 429}
    assert statuses[401] <= CALLS / 2


def test_a_hospitals_usual_calls_never_meet_the_quota(tmp_path):
    """The control of the tests above: under the product's own bounds all of them are served."""
    with real_coordinator(tmp_path / "wide", Wire(hold_s=0.2)) as wide:
        key = transport_key()
        wide.flower.register("ash", public_line(key))
        node = TinyNode(wide.flower.public_port, wide.ca, key)
        node.activate()
        for _ in range(CALLS):
            assert node.heartbeat()
        node.close()


def test_a_hospital_that_is_told_to_wait_does_and_takes_part_in_everything(tmp_path):
    class Counted(Quota):
        held = 0

        def left(self, name: str, now: float) -> float:
            wait = super().left(name, now)
            self.held += wait > 0
            return wait

    with real_coordinator(tmp_path / "thin", THIN) as thin:
        quota = thin.flower._public_door._quota = Counted(THIN.calls_per_s, THIN.most_calls)
        hospital, stop = Hospital("ash"), threading.Event()
        world = LinkWorld(pause=lambda event, seconds: event.wait(min(seconds, 0.2)))
        link = hospital_link(thin, tmp_path, "ash", shell(lambda: hospital), world)
        runs = threading.Thread(target=link.run, args=(stop,))
        runs.start()
        try:
            driver = Driver(["ash"], STEPS)
            exchange(
                driver,
                thin.flower.grid(),
                SystemClock(),
                registered=thin.flower.site_of,
                silence=thin.flower.silence,
                pace=Pace(poll_s=0.5, look_s=0.1),
                pause=thin.flower.wait,
            ).serve(driver, driver.over)
        finally:
            stop.set()
            runs.join()
    assert replies(driver, "ash") == [b"hello", *(step[::-1] for step in STEPS)]
    assert hospital.asked == [(), *((step,) for step in STEPS)]
    assert quota.held > 0, "control: it was told to wait"


# ---------------------------------------------------------------------------- the bucket


def passed(quota: Quota, name: str, start: float, seconds: float, step: float) -> int:
    """How many calls pass of somebody who calls every `step` seconds."""
    count = 0
    for number in range(round(seconds / step)):
        now = start + number * step
        if not quota.left(name, now):
            quota.spend(name, now)
            count += 1
    return count


def test_a_stretch_at_once_and_the_rate_in_the_long_run():
    quota = Quota(10.0, 50)
    assert passed(quota, "ash", 0.0, 1.0, 0.001) == 59  # the bucket, and what it forgave meanwhile
    assert passed(quota, "ash", 1.0, 100.0, 0.01) in {999, 1000, 1001}
    assert passed(quota, "ash", 1000.0, 0.01, 0.0001) == 50
    assert passed(quota, "birch", 1000.0, 0.01, 0.0001) == 50


def test_who_waits_as_long_as_it_is_told_is_served():
    quota = Quota(3.0, 7)
    now = 5.0
    for _ in range(100):
        now += quota.left("ash", now) + 1e-9
        assert not quota.left("ash", now)
        quota.spend("ash", now)
    assert now >= 5.0 + (100 - 7 - 1) / 3.0


def test_many_names_leave_no_trace_once_they_are_quiet():
    quota = Quota(100.0, 10)
    for number in range(50_000):
        quota.spend(str(number), number * 0.001)
    assert len(quota._spent) <= 4200
