"""The trainer child: the same numbers, its own death, and nothing of it in the daemon."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from client.local import LocalFiles
from client.trainer import (
    PACKAGES,
    TrainerProcess,
    TrainerTask,
    _Channel,
    _fault,
    _place_only,
    frame_bound,
)
from common.errors import Code, DataError, ProtocolError, RefusedError, StorageError
from common.integrity import code_digest
from common.statistics import StatisticsLayout

SEEDED = """
import resource, os, sys
from client.trainer import serve
from common.world import SeededEntropy
import torch
torch.set_num_threads(1)
inward, outward = os.dup(0), os.dup(1)
os.dup2(2, 1)
serve(inward, outward, entropy=SeededEntropy("noise"))
"""
STATE_NAMES = {"statistics/mean", "statistics/deviation"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bundle_of):
    home = tmp_path_factory.mktemp("trainer")
    bundle_of().save(home / "bundle")
    plain = bundle_of(
        privacy={"mode": "none"}
        | dict.fromkeys(("epsilon", "delta", "clip_norm", "statistics_epsilon"))
    )
    plain.save(home / "plain")
    step = {"local_steps": 1, "optimizer": {}, "expected_batch": 12, "sampling_rate": 0.5}
    joint = bundle_of(
        privacy={"mode": "joint"}, training=step, aggregation={"average": 0.9, "ring_bits": None}
    )
    joint.save(home / "joint")
    return home


@pytest.fixture
def task_of(folder, bundle_of):
    def make(name="bundle", **changes) -> TrainerTask:
        from common.bundle import Bundle

        fields = {
            "site": "north",
            "folder": folder / name,
            "bundle": Bundle.load(folder / name),
            "files": LocalFiles((_labs(folder),)),
            "split_key": b"k" * 32,
            "device": "cpu",
            "code": code_digest(PACKAGES),
        }
        return TrainerTask(**(fields | changes))

    return make


def _labs(folder: Path) -> Path:
    return Path(__file__).parents[3] / "configs" / "data" / "synthetic-labs.csv"


def state_of(bundle):
    return {
        **bundle.initial,
        **StatisticsLayout(4, 0.0).initial(),
        "optimizer/m/x": np.ones(3, np.float32),
    }


@pytest.fixture
def child(tmp_path):
    made = []

    def start(task, **options) -> TrainerProcess:
        made.append(TrainerProcess(task, log=tmp_path / "trainer.log", **options))
        return made[-1]

    yield start
    for process in made:
        process.close()


def test_the_child_gives_the_numbers_of_a_trainer_in_this_process(task_of, child, local):
    """Same seeded noise, which only a test's own program can ask for."""
    from common.world import SeededEntropy

    task = task_of()
    far = child(task, command=(sys.executable, "-c", SEEDED))
    near = local(task, SeededEntropy("noise"))
    state = state_of(task.bundle)
    assert np.array_equal(far.statistics(), near.statistics())
    assert np.array_equal(far.measure(state, 1), near.measure(state, 1))
    update = far.train(state, 1)
    assert update.dtype == np.float32
    assert np.array_equal(update, near.train(state, 1))
    assert far.starts == 1


def test_the_child_gives_joint_words_and_measures_the_average(task_of, child, local):
    from common.world import SeededEntropy

    task = task_of("joint")
    far = child(task, command=(sys.executable, "-c", SEEDED))
    near = local(task, SeededEntropy("noise"))
    state = {**task.bundle.optimizer().initial(task.bundle.initial), **state_of(task.bundle)}
    moved = {n: v + 1 for n, v in state.items() if n.startswith("optimizer/average/")}
    assert moved
    assert np.array_equal(far.statistics(), near.statistics())
    words = far.train(state, 1)
    assert words.dtype == np.int32
    assert np.array_equal(words, near.train(state, 1))
    last = far.measure(state, 1)
    assert np.array_equal(last, near.measure(state, 1))
    average = far.measure({**state, **moved}, 1)
    assert np.array_equal(average, near.measure({**state, **moved}, 1))


def test_a_correction_of_scaffold_reaches_the_child(task_of, child, local):
    from common.strategy import CORRECTION
    from common.world import SeededEntropy

    task = task_of()
    far = child(task, command=(sys.executable, "-c", SEEDED))
    near = local(task, SeededEntropy("noise"))
    moved = {CORRECTION + n: np.full_like(v, 0.5) for n, v in task.bundle.initial.items()}
    plain, corrected = state_of(task.bundle), {**state_of(task.bundle), **moved}
    update = far.train(corrected, 1)
    assert np.array_equal(update, near.train(corrected, 1))
    assert not np.allclose(update, near.train(plain, 2), atol=1e-3)


def test_tensors_of_the_hospitals_own_reach_the_child_and_come_back_last(task_of, child, local):
    from dataclasses import replace

    from common.world import SeededEntropy

    plain = task_of()
    names = [spec.name for spec in plain.bundle.layout.specs]
    bundle = replace(plain.bundle, personal=tuple(names[:1]))
    bundle.save(plain.folder)
    task = replace(plain, bundle=bundle)
    far = child(task, command=(sys.executable, "-c", SEEDED))
    near = local(task, SeededEntropy("noise"))
    state = state_of(plain.bundle)
    trained = far.train(state, 1)
    assert np.array_equal(trained, near.train(state, 1))
    assert trained.shape == (bundle.layout.size + bundle.own_layout.size,)
    # The same steps as where nothing stays, in another order.
    whole = local(plain, SeededEntropy("noise")).train(state, 1)
    first = bundle.own_layout.size
    assert np.array_equal(trained, np.concatenate([whole[first:], whole[:first]]))


def test_a_real_child_draws_its_own_noise_and_stays_warm(task_of, child, tmp_path):
    task = task_of()
    trainer = child(task)
    state = state_of(task.bundle)
    first, second = trainer.train(state, 1), trainer.train(state, 2)
    assert np.isfinite(first).all()
    assert not np.array_equal(first, second)
    assert trainer.starts == 1
    pid = trainer.pid
    # Nothing of the hospital is in the child's arguments or its environment.
    for name in ("cmdline", "environ"):
        shown = Path(f"/proc/{pid}/{name}").read_bytes()
        assert b"synthetic-labs" not in shown
        assert task.split_key not in shown
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"
    assert (tmp_path / "trainer.log").stat().st_mode & 0o077 == 0
    trainer.export(tmp_path / "model", {n: v for n, v in state.items() if n in task.names})
    assert json.loads((tmp_path / "model" / "task.json").read_text())["task"]["labels"]

    # Killed in the middle of work: told by its own code, and the next round has a new child.
    os.kill(pid, signal.SIGSTOP)
    stopped = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
    stopped.start()
    with pytest.raises(DataError) as lost:
        trainer.train(state, 3)
    stopped.join()
    assert lost.value.code is Code.TRAINER_LOST
    assert "SIGKILL" in lost.value.message
    assert trainer.pid is None
    assert np.isfinite(trainer.train(state, 4)).all()
    assert trainer.starts == 2


def test_a_child_that_hangs_is_ended_by_the_deadline_or_by_the_kill_switch(task_of, child):
    silent = (sys.executable, "-c", "import sys; sys.stdin.buffer.read()")
    switch = threading.Event()
    trainer = child(task_of(), command=silent, cancelled=switch.is_set)
    threading.Timer(0.2, switch.set).start()
    with pytest.raises(RefusedError) as refused:
        trainer.ready()
    assert refused.value.code is Code.APPROVAL_STOPPED
    assert trainer.pid is None


def test_a_hung_piece_of_work_is_given_up(task_of, child, monkeypatch):
    monkeypatch.setattr("client.trainer._OPENING_S", 0.0)
    trainer = child(
        task_of(), command=(sys.executable, "-c", "import sys; sys.stdin.buffer.read()")
    )
    with pytest.raises(DataError) as lost:
        trainer.ready()
    assert lost.value.code is Code.TRAINER_LOST


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(0)",
        "import os; os.write(1, b'hello, I am a library that prints' * 9)",
        "import os, struct; os.write(1, struct.pack('>4sIQ', b'WRT1', 1 << 30, 0))",
        "import os, struct; os.write(1, struct.pack('>4sIQ', b'WRT1', 8, 1 << 50))",
        "import os, struct; os.write(1, struct.pack('>4sIQ', b'WRT1', 8, 0) + b'x' * 8)",
    ],
)
def test_whatever_a_broken_child_says_is_a_lost_trainer(task_of, child, program):
    trainer = child(task_of(), command=(sys.executable, "-c", program))
    with pytest.raises(DataError) as lost:
        trainer.ready()
    assert lost.value.code is Code.TRAINER_LOST


def test_a_program_that_cannot_be_started_is_a_lost_trainer(task_of, child):
    with pytest.raises(DataError) as lost:
        child(task_of(), command=("/nowhere/python",)).ready()
    assert lost.value.code is Code.TRAINER_LOST


def test_what_is_wrong_with_records_or_code_is_told_before_torch_is_loaded(task_of, child):
    cases = {
        Code.APPROVAL_CODE: task_of(code=bytes(32)),
        Code.DATA_UNREADABLE: task_of(files=LocalFiles((Path("/nowhere.csv"),))),
        Code.BUNDLE_DAMAGED: task_of(folder=Path("/nowhere")),
    }
    for code, task in cases.items():
        trainer = child(task)
        with pytest.raises((DataError, RefusedError)) as told:
            trainer.ready()
        expected = {Code.BUNDLE_DAMAGED: {Code.BUNDLE_DAMAGED, Code.CONFIG_UNREADABLE}}
        assert told.value.code in expected.get(code, {code})
        assert trainer.pid is None


def test_only_an_export_passes_on_that_a_disk_failed():
    told = {"kind": "StorageError", "code": Code.MODEL_OUTPUT.label, "message": "m", "remedy": "r"}
    assert type(_fault(told, "export")) is StorageError
    assert type(_fault(told, "train")) is DataError
    assert type(_fault({"kind": "RefusedError", "code": "WR-3104"}, "open")) is RefusedError
    assert _fault({"kind": "Exception", "code": "nonsense"}, "train").code is Code.TRAINER_LOST


# ---------------------------------------------------------------------------- frames


@pytest.fixture
def pipe():
    inward, outward = os.pipe()
    yield inward, outward
    for end in (inward, outward):
        with contextlib.suppress(OSError):
            os.close(end)


def test_arrays_arrive_as_they_left_and_are_views_of_one_buffer(pipe):
    channel = _Channel(*pipe)
    channel.bound = 1 << 16
    sent = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.zeros(0, np.float32),
        "c": np.float32(4.0).reshape(()),
        "d": np.arange(5, dtype=np.int64)[::-1],
        "e": np.arange(-3, 4, dtype=np.int32),
    }
    channel.send({"verb": "train", "round": 7}, sent)
    header, found = channel.receive()
    assert header["round"] == 7
    assert {n: (a.dtype, a.shape) for n, a in found.items()} == {
        n: (a.dtype, a.shape) for n, a in sent.items()
    }
    assert all(np.array_equal(found[name], sent[name]) for name in sent)
    assert all(a.base is not None and not a.flags.owndata for a in found.values())


def test_a_frame_beyond_its_bound_is_refused_before_it_is_read(pipe):
    channel = _Channel(*pipe)
    channel.bound = 7
    channel.send({"verb": "train"}, {"a": np.zeros(2, np.float32)})
    with pytest.raises(ProtocolError):
        channel.receive()


@pytest.mark.parametrize(
    "arrays",
    [
        (("a", "<f8", (1,)),),
        (("a", "<f4", (3,)),),
        (("a", "<f4", (1,)),),
        (("a", "<f4", (-2,)),),
        (("a", "<f4", (1,)), ("a", "<f4", (1,))),
        (("a", "|O", (1,)),),
        (("a", "<f4", (2**62, 2**62)),),
        7,
    ],
)
def test_a_frame_that_lies_about_its_arrays_is_refused(pipe, arrays):
    from client.trainer import _HEAD
    from common.crypto.digest import encode

    channel = _Channel(*pipe)
    channel.bound = 64
    head = encode({"verb": "done", "arrays": arrays})
    os.write(pipe[1], _HEAD.pack(b"WRT1", len(head), 8) + head + bytes(8))
    with pytest.raises(ProtocolError):
        channel.receive()


def test_other_kinds_of_numbers_do_not_travel(pipe):
    with pytest.raises(TypeError):
        _Channel(*pipe).send({"verb": "train"}, {"a": np.zeros(2, np.float64)})


def test_the_bound_holds_the_largest_answer(task_of):
    bundle = task_of().bundle
    assert frame_bound(bundle) >= 4 * bundle.layout.size + 8 * 4 * 2
    assert frame_bound(bundle) < 1 << 16


def test_a_bug_in_the_child_is_logged_without_its_text(capsys):
    with pytest.raises(ValueError, match="Smith") as raised:
        int("Mr Smith, born 1950")
    _place_only(raised.type, raised.value, raised.tb)
    told = capsys.readouterr().err
    assert "ValueError" in told
    assert "test_trainer.py" in told
    assert "Smith" not in told


def test_the_child_ends_with_its_parent(task_of, tmp_path, folder):
    """The parent is killed -9 in the middle of work; the child must not stay behind."""
    program = f"""
import sys, threading
from pathlib import Path
from client.trainer import TrainerProcess, TrainerTask, PACKAGES
from client.local import LocalFiles
from common.bundle import Bundle
from common.integrity import code_digest
folder = Path({str(folder / "bundle")!r})
task = TrainerTask("north", folder, Bundle.load(folder), LocalFiles((Path({str(_labs(folder))!r}),)),
                   b"k" * 32, "cpu", code_digest(PACKAGES))
trainer = TrainerProcess(task, log=Path({str(tmp_path / "log")!r}))
trainer.ready()
assert "torch" not in sys.modules and "flwr" not in sys.modules
print(trainer.pid, flush=True)
sys.stdin.read()
"""
    root = Path(__file__).parents[3]
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    pid = int(parent.stdout.readline())
    watched = os.pidfd_open(pid)
    try:
        parent.kill()
        parent.wait()
        import select

        ended, _, _ = select.select([watched], [], [], 60)
        assert ended
    finally:
        os.close(watched)
        parent.stdin.close()
        parent.stdout.close()


# ---------------------------------------------------------------------------- notes


@pytest.fixture(scope="module")
def notes_study(tiny_bert, write_study, tmp_path_factory):
    """A study of notes with a tiny encoder, as a bundle, and one hospital's file."""
    from client.build import build_model
    from common.bundle import resolve
    from common.config import load
    from common.study import Site, Study

    folder = tmp_path_factory.mktemp("notes")
    study = load(write_study(folder, tiny_bert, hospitals=("north",)), Study)
    study = study.with_sites([Site(id=name) for name in ("east", "north", "south")])
    built = build_model(study)
    bundle = resolve(study, built.initial, built.backbone_digest, built.config)
    bundle.save(folder / "bundle")
    return folder, bundle


def test_a_child_reads_notes_trains_and_writes_a_hugging_face_folder(
    notes_study, task_of, child, tmp_path
):
    folder, bundle = notes_study
    task = task_of(
        folder=folder / "bundle", bundle=bundle, files=LocalFiles((folder / "notes.csv",))
    )
    trainer = child(task)
    update = trainer.train(dict(bundle.initial), 1)
    assert np.isfinite(update).all()
    assert update.any()
    trainer.export(tmp_path / "model", dict(bundle.initial))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "model").iterdir()
    }
    # What is already there is not written over, and the child lives on.
    with pytest.raises(DataError) as refused:
        trainer.export(tmp_path / "model", dict(bundle.initial))
    assert refused.value.code is Code.OUTPUT_EXISTS
    assert trainer.starts == 1


def test_a_backbone_that_is_not_the_studys_is_refused(notes_study, task_of):
    from dataclasses import replace

    from client.trainer import _require_backbone

    _, notes = notes_study
    for bundle in (notes, task_of().bundle):
        _require_backbone(bundle)
        with pytest.raises(DataError) as refused:
            _require_backbone(replace(bundle, backbone_digest=bytes(32)))
        assert refused.value.code is Code.BACKBONE_DIFFERS


def test_a_child_reads_the_studys_graph_where_the_hospital_keeps_it(task_of, child, tmp_path):
    from client.build import build_model
    from client.data.synthetic_visits import write_visits
    from client.knowledge.shelf import read_knowledge
    from common.bundle import resolve
    from common.config import load
    from common.study import Site, Study

    graphs = tmp_path / "graphs" / "data"
    graphs.mkdir(parents=True)
    write_visits(graphs)
    configs = Path(__file__).parents[3] / "configs"
    study = load(configs / "medication.yaml", Study).with_sites(
        [Site(id=name) for name in ("east", "north", "south")]
    )
    read_knowledge(study.task, graphs.parent)
    built = build_model(study)
    bundle = resolve(study, built.initial, built.backbone_digest, built.config)
    bundle.save(tmp_path / "bundle")

    def trained(knowledge):
        files = LocalFiles((graphs / "synthetic-visits.csv",), knowledge=knowledge)
        task = task_of(folder=tmp_path / "bundle", bundle=bundle, files=files)
        return child(task).train(dict(bundle.initial), 1)

    assert np.isfinite(trained(graphs.parent)).all()
    with pytest.raises(DataError) as refused:
        trained(None)
    assert refused.value.code is Code.GRAPH_ABSENT
