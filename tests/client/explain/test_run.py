"""The page and the verb: private, whole, self-contained, and text stays text."""

import html.parser
import importlib.util
import json
import re
import socket
import stat

import numpy as np
import pytest
import torch

from client import saved
from client.data.intake import Names, receive_inputs
from client.explain import run
from client.explain.page import Case, page
from client.explain.run import explain
from client.explain.saved import RowsModel
from client.explain.text import TextModel
from client.predict import predict
from client.tasks import tabular
from client.tasks.rows import initial_tensors
from common.cli import main
from common.errors import Code, DataError, StorageError
from common.tasks.tabular import TabularTask
from common.tensors import save_tensors

NASTY = (
    "</p><script>alert(1)</script><img src=x onerror=alert(2)> \" ' &amp; "
    "<!-- </style> \u202e fever \x00\x1b[31m javascript:alert(3) <svg/onload=alert(4)>"
)


class Parsed(html.parser.HTMLParser):
    """Every tag, its attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def table(learned, tmp_path):
    _, test = learned
    path = tmp_path / "notes.ndjson"
    rows = [{"text": record.text, "who": record.patient} for record in test[:4]]
    rows.insert(1, {"text": NASTY, "who": "<b>Bob</b>"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something wants to call out")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_note_with_a_script_in_it_stays_text(learned, table, tmp_path, no_network):
    explain(
        learned[0],
        [table],
        tmp_path / "out.html",
        names=Names(patient="who"),
        device="cpu",
        limit=2,
    )
    text = (tmp_path / "out.html").read_text()
    found = Parsed(text)
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "p",
        "section",
        "span",
        "mark",
        "table",
        "caption",
        "tr",
        "th",
        "td",
        "strong",
        "figure",
        "figcaption",
        "svg",
        "path",
        "text",
        "polyline",
        "rect",
        "ul",
        "li",
    }
    assert {tag for tag, _ in found.tags} <= allowed
    names = {name for _, attributes in found.tags for name in attributes}
    assert not {name for name in names if name.startswith("on")}
    assert not names & {"src", "href", "style", "srcset", "action", "formaction"}
    whole = "".join(found.text)
    assert "<script>alert(1)</script>" in whole, "shown as it was written"
    assert "<b>Bob</b>" in whole
    assert "\u202e" not in text
    assert "\x00" not in text


def test_control_an_unescaped_note_is_noticed(learned, monkeypatch):
    monkeypatch.setattr("client.explain.page._text", lambda value: value)
    found = TextModel(learned[0], "cpu").explain("fever")
    tags = {tag for tag, _ in Parsed("".join(page([Case(2, NASTY, found)]))).tags}
    assert {"script", "img"} <= tags


def test_the_page_forbids_whatever_is_not_its_own_and_names_no_address(learned, table, tmp_path):
    import base64
    import hashlib

    explain(learned[0], [table], tmp_path / "out.html", device="cpu", limit=1)
    text = (tmp_path / "out.html").read_text()
    policy = next(a["content"] for t, a in Parsed(text).tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy
    assert not re.search(r"https?://|//[a-z]|url\(|@import", text)


def test_only_its_owner_may_read_the_page_and_the_same_records_give_the_same_bytes(
    learned, table, tmp_path
):
    outs = [tmp_path / "a.html", tmp_path / "deep" / "folder"]
    done = [explain(learned[0], [table], out, device="cpu", limit=2) for out in outs]
    assert done[1].page == outs[1] / "explanation.html"
    for each in done:
        assert stat.S_IMODE(each.page.stat().st_mode) == 0o600
    assert stat.S_IMODE(outs[1].stat().st_mode) == 0o700
    assert done[0].page.read_bytes() == done[1].page.read_bytes()
    assert (done[0].records, done[0].left_out) == (2, 3)


def test_nothing_is_overwritten_and_a_fault_leaves_nothing_behind(
    learned, table, tmp_path, monkeypatch
):
    out = tmp_path / "out" / "page.html"
    out.parent.mkdir()
    out.write_text("mine")
    with pytest.raises(DataError) as error:
        explain(learned[0], [table], out, device="cpu", limit=1)
    assert error.value.code is Code.OUTPUT_EXISTS
    assert out.read_text() == "mine"
    out.unlink()
    out.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError):
        explain(learned[0], [table], out, device="cpu", limit=1)
    out.unlink()
    monkeypatch.setattr(TextModel, "explain", _broken)
    with pytest.raises(RuntimeError, match="halfway"):
        explain(learned[0], [table], out, device="cpu", limit=3)
    assert list(out.parent.iterdir()) == []


def _broken(*_):
    raise RuntimeError("halfway")


def test_a_page_that_cannot_be_written_says_why(learned, table, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.os, "fsync", full)
    with pytest.raises(StorageError) as error:
        explain(learned[0], [table], tmp_path / "o.html", device="cpu", limit=1)
    assert error.value.code is Code.MODEL_OUTPUT
    assert not list(tmp_path.glob("*.html*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        explain(learned[0], [table], tmp_path / "file" / "o.html", device="cpu", limit=1)


def test_the_verb_tells_figures_and_no_word_of_a_record(learned, table, tmp_path, capsys):
    arguments = ["explain", str(learned[0]), str(table), "--limit", "3", "--device", "cpu"]
    assert main([*arguments, "--label", "asthma", "--patient", "who", "--json"]) == 0
    told = capsys.readouterr().out
    found = json.loads(told.splitlines()[-1])
    assert found["explained"] == 3
    assert found["left_out"] == 2
    assert found["output"] == str(tmp_path / "notes-explained.html")
    assert "asthma" not in told
    assert "Bob" not in told
    page_text = (tmp_path / "notes-explained.html").read_text()
    assert page_text.count("Explained: <strong>asthma</strong>") == 3
    assert main(arguments) == 3, "a second page is not written over the first"
    assert "WR-2109" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "status", "code"),
    [
        (["--limit", "0"], 2, "WR-7001"),
        (["--limit", "501"], 2, "WR-7001"),
        (["--label", "gout"], 3, "WR-2009"),
        (["--text", "nota"], 3, "WR-2005"),
    ],
)
def test_mistakes_are_named_and_leave_no_page(learned, table, tmp_path, capsys, more, status, code):
    out = tmp_path / "pages" / "o.html"
    assert main(["explain", str(learned[0]), str(table), "--out", str(out), *more]) == status
    assert code in capsys.readouterr().err
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_a_folder_that_is_no_model_is_named(table, tmp_path, capsys):
    assert main(["explain", str(tmp_path / "nothing"), str(table)]) == 3
    assert "WR-2101" in capsys.readouterr().err


# ------------------------------------------------------------------------ saved networks


def save(folder, task, code, *, features):
    folder.mkdir()
    stream = np.random.default_rng(0)
    weights = {
        name: (value + stream.normal(0, 0.4, value.shape)).astype(np.float32)
        for name, value in initial_tensors(code, task).items()
    }
    save_tensors(folder / "model.safetensors", weights)
    facts = {
        "format": "wardround-model/1",
        "task": task.model_dump(mode="json"),
        "mean": [0.4] * features,
        "deviation": [0.2] * features,
    }
    (folder / "task.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def heart(tmp_path):
    task = TabularTask.model_validate(
        {
            "kind": "tabular",
            "labels": ["well", "ill"],
            "features": [
                {"name": "age", "low": 0.0, "high": 100.0},
                {"name": "chol<b>", "low": 0.0, "high": 10.0},
            ],
            "categories": [{"name": "sex", "values": ["f", "m"]}],
            "hidden": [8],
        }
    )
    return save(tmp_path / "heart", task, tabular, features=2)


def test_a_saved_model_of_numbers_is_explained_as_it_predicts(heart, tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("age,chol<b>,sex\n80,9,m\n40,?,f\n30,2,x\n")
    predict(heart, table, tmp_path / "out.ndjson", device="cpu")
    told = [json.loads(line) for line in (tmp_path / "out.ndjson").read_text().splitlines()]
    model = RowsModel(heart, "cpu")
    records = receive_inputs(model.task, [table])
    for record, answer in zip(records, told, strict=True):
        found = model.explain(record)
        assert found.found.answer["label"] == answer["label"]
        assert found.found.answer["probabilities"] == pytest.approx(
            answer["probabilities"], abs=1e-6
        )
        assert found.found.balance.complete
    second = model.explain(records[1])
    assert second.values[1] == 0, "a missing value counts as the federation's mean"
    assert second.shown[1] == "missing, counts as 4"
    assert model.explain(records[2]).values[2] == 0, "an unknown category is told by no input"
    done = explain(heart, [table], tmp_path / "o.html", device="cpu")
    text = done.page.read_text()
    assert "chol&lt;b&gt;: 9 (mean 4)" in text
    assert done.incomplete == 0


def test_a_damaged_folder_of_numbers_is_named(heart):
    (heart / "task.json").write_text("{}")
    with pytest.raises(DataError) as error:
        RowsModel(heart, "cpu")
    assert error.value.code is Code.MODEL_STATE


def loaded_as(monkeypatch, task, code, folder, *, features):
    monkeypatch.setattr(saved, "Task", type(task))
    monkeypatch.setattr(saved, "code_of", lambda _: code)
    return RowsModel(save(folder, task, code, features=features), "cpu")


@pytest.mark.parametrize("number", [None, {"column": "later", "low": 0.0, "high": 10.0}])
def test_a_saved_trajectory_is_explained_by_hour_and_measurement(monkeypatch, tmp_path, number):
    from client.tasks import prognosis
    from common.tasks.prognosis import PrognosisTask

    task = PrognosisTask.model_validate(
        {
            "kind": "prognosis",
            "labels": [] if number else ["lives", "dies"],
            "number": number,
            "last": "urea" if number else None,
            "features": [
                {"name": name, "low": 0.0, "high": 10.0} for name in ("age", "urea", "rate")
            ],
            "hours": 8,
            "width": 4,
        }
    )
    model = loaded_as(monkeypatch, task, prognosis, tmp_path / "course", features=3)
    for record in prognosis.probes(task):
        found = model.explain(record)
        assert found.values.shape == (8, 3)
        assert found.found.balance.complete
        assert found.values.sum() == pytest.approx(found.found.balance.total, abs=1e-6)
        assert not found.values[np.isnan(found.grid.values)].any(), "only what was measured counts"
        told = found.found.answer["value" if number else "probabilities"]
        at = told if number else told[found.found.explained]
        assert found.found.curve.ours[0] == pytest.approx(at, abs=1e-5)
        assert "".join(page([Case(1, None, found)])).count("<section") == 3


def test_a_saved_imaging_model_is_explained(monkeypatch, tmp_path):
    if importlib.util.find_spec("client.data.images") is None:
        pytest.skip("client.data.images is not there")
    from client.tasks import imaging
    from common.tasks.imaging import ImagingTask

    task = ImagingTask.model_validate(
        {
            "kind": "imaging",
            "labels": ["well", "ill"],
            "size": 28,
            "channels": 1,
            "network": {"kind": "resnet", "widths": [8, 16]},
        }
    )
    model = loaded_as(monkeypatch, task, imaging, tmp_path / "xray", features=0)
    found = model.explain(imaging.probes(task)[0])
    assert found.values.shape == found.cam.shape == (28, 28)
    assert found.found.balance.complete
    np.testing.assert_array_equal(found.picture, imaging.probes(task)[0].image)


def test_help_needs_no_torch(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from common.cli import main; main(['explain', '--help']); "
        "assert not {'torch', 'captum', 'numpy', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert torch.is_grad_enabled()
