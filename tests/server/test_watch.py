"""What an operator sees: the status file, the metrics, the health service."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from prometheus_client import generate_latest

from common.errors import Code, StorageError
from server.watch import Health, RunStatus, SiteStatus, keep, kept, registry, serving

NORTH = SiteStatus("north", "asked", online=True, heard=2.5, bytes_up=1000, bytes_down=2000)
SOUTH = SiteStatus("south", "offline", False, None, 0, 0, "WR-3101")
STATUS = RunStatus(
    at=1_800_000_000, study="lungs", digest="ab" * 32, run="cd" * 32, phase="upload", round=4,
    kind="train", turn=3, turns=12, completed=2, aborted=1, rejected=1, quorum=3, waiting_for=("south",),
    deadline=12.5, ends=None, refused={"WR-4246": 2}, sites=(NORTH, SOUTH),
)  # fmt: skip


def test_a_status_comes_back_as_it_was_kept(tmp_path):
    keep(tmp_path, STATUS)
    assert kept(tmp_path) == STATUS
    keep(tmp_path, replace(STATUS, phase="done", deadline=None))
    assert kept(tmp_path).phase == "done"


def test_no_status_and_a_damaged_one_say_what_to_do(tmp_path):
    with pytest.raises(StorageError) as absent:
        kept(tmp_path)
    assert absent.value.code is Code.NOT_A_RUN
    for damage in ("", "[]", "{}", json.dumps({**STATUS.to_json(), "extra": 1})):
        (tmp_path / "status.json").write_text(damage)
        with pytest.raises(StorageError) as damaged:
            kept(tmp_path)
        assert damaged.value.code is Code.JOURNAL_DAMAGED


def lines(status):
    return generate_latest(registry(lambda: status)).decode().splitlines()


def test_metrics_say_what_the_status_says():
    told = lines(STATUS)
    for line in (
        "wardround_rounds_completed 2.0",
        "wardround_rounds_aborted 1.0",
        "wardround_models_rejected 1.0",
        'wardround_phase{phase="upload"} 1.0',
        "wardround_phase_deadline_seconds 12.5",
        'wardround_refused_total{code="WR-4246"} 2.0',
        'wardround_site_online{site="north"} 1.0',
        'wardround_site_online{site="south"} 0.0',
        'wardround_site_heard_age_seconds{site="north"} 2.5',
        'wardround_site_bytes_up{site="north"} 1000.0',
    ):
        assert line in told
    assert not any("heard_age" in line and "south" in line for line in told)


def test_before_the_first_status_only_the_process_is_measured():
    told = lines(None)
    assert not any(line.startswith("wardround_") for line in told)
    assert any(line.startswith("process_") for line in told)


def test_health_says_serving_only_while_it_was_told_so_lately():
    health = Health(0)
    try:
        assert not serving(health.port)
        health.fresh(serving=True)
        assert serving(health.port)
        health.fresh(serving=False)
        assert not serving(health.port)
    finally:
        health.stop()
    assert not serving(health.port)


def test_a_taken_port_is_named():
    health = Health(0)
    try:
        with pytest.raises(StorageError) as caught:
            Health(health.port)
        assert caught.value.code is Code.PORT_TAKEN
        assert str(health.port) in caught.value.message
    finally:
        health.stop()
