"""Questions that are not what they say: refused within bounds, named, and survived."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import closing, suppress

import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from hypothesis import given, settings
from hypothesis import strategies as st

from client import flower
from client.app import opened
from client.link import LinkLimits, ObjectCache
from common.errors import Code
from tests.fleet_double import NODE, FleetDouble, Running, make_pki, question, raw_question

MIB = 1 << 20


@pytest.fixture(scope="session")
def pki(tmp_path_factory):
    return make_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def fleet(pki):
    with closing(FleetDouble(pki)) as double:
        yield double


def part(kind, children=(), body=b""):
    """A part as Flower writes one, and its name."""
    content = f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body
    return hashlib.sha256(content).hexdigest(), content


def tree(name, *children):
    return ObjectTree(object_id=name, children=list(children))


def refused(fleet, running, message, its_tree=None):
    """Whether the link answers BAD_QUESTION, asks nobody, and goes on."""
    its_tree = its_tree or get_object_tree(message)
    with fleet.changed:
        fleet.waiting.append((message, its_tree))
    name = message.metadata.message_id
    reply = fleet.reply_to(name)
    assert reply.has_error()
    assert reply.error.reason == Code.BAD_QUESTION.label
    assert running.hospital.asked == []
    good = fleet.put(question((b"abc", os.urandom(8))))
    assert opened(fleet.reply_to(good).content)[1][0] == b"cba"
    running.hospital.asked.clear()


# ---------------------------------------------------------------------------- parts
def test_a_part_without_its_digest_is_refused(fleet, pki, tmp_path):
    with Running(pki, fleet.address, tmp_path) as running:
        for spoiled in range(6):
            message = question((os.urandom(50),))
            names = list(get_all_nested_objects(message))
            name = fleet.put(message)
            fleet.waiting.clear()
            whole = fleet.parts[names[spoiled]]
            fleet.parts[names[spoiled]] = whole[:-1] + bytes([whole[-1] ^ 1])
            refused(fleet, running, message)
            assert name == message.metadata.message_id


def test_a_part_that_is_gone_drops_its_question(fleet, pki, tmp_path):
    with Running(pki, fleet.address, tmp_path):
        for index, replacement in enumerate((None, b"")):  # unknown; announced but never there
            message = question((os.urandom(50),))
            last = list(get_all_nested_objects(message))[index]
            lost = fleet.put(message)
            if replacement is None:
                fleet.parts.pop(last)
            else:
                fleet.parts[last] = replacement
            good = fleet.put(question((b"abc", os.urandom(8))))
            assert opened(fleet.reply_to(good).content)[1][0] == b"cba"
            assert lost not in fleet.replies


def test_a_question_beyond_the_bound_is_refused_before_a_byte_of_it_is_fetched(
    fleet, pki, tmp_path
):
    limits = LinkLimits(most_bytes=MIB)
    with Running(pki, fleet.address, tmp_path, limits=limits) as running:
        message = question((os.urandom(MIB + 1),))
        fleet.put(message)
        fleet.waiting.clear()
        refused(fleet, running, message)
        chunk = next(name for name, body in fleet.parts.items() if len(body) > MIB)
        assert fleet.pulled[chunk] == 0
        # The control is one byte smaller.
        good = fleet.put(question((os.urandom(MIB),)))
        assert len(opened(fleet.reply_to(good).content)[1][0]) == MIB


def test_a_part_longer_than_a_part_may_be_is_cut_off(fleet, pki, tmp_path):
    message = question((b"abc",))
    name = fleet.put(message)
    with fleet.changed:
        long = b"\x22" + (18 * MIB).to_bytes(4, "big") + bytes(18 * MIB)
        fleet.fault = lambda path, n: ("garbage", long) if path == "pull-object" and n < 4 else None
    with Running(pki, fleet.address, tmp_path) as running:
        assert opened(fleet.reply_to(name).content)[1] == (b"cba",)
    assert running.link.state().bytes_down < 4 * MIB  # structure is bounded tighter: 1 MiB each


# ---------------------------------------------------------------------------- trees
def wide(count):
    return [tree(hashlib.sha256(str(n).encode()).hexdigest()) for n in range(count)]


def deep(count):
    made = tree("a" * 64)
    for n in range(count):
        made = tree(hashlib.sha256(str(n).encode()).hexdigest(), made)
    return made


TREES = {
    "too wide": lambda name: tree(name, *wide(600)),
    "too deep": lambda name: tree(name, deep(5)),
    "far too deep": lambda name: tree(name, deep(90)),
    "a name that is a path": lambda name: tree(name, tree("../../../../etc/passwd")),
    "a name in capitals": lambda name: tree(name, tree("A" * 64)),
    "a contradiction": lambda name: tree(
        name, tree("a" * 64, tree("b" * 64)), tree("c" * 64, tree("a" * 64, tree("d" * 64)))
    ),
    "another message": lambda _: tree("e" * 64),
    "no children": tree,
    "other children": lambda name: tree(name, tree("f" * 64)),
}


@pytest.mark.parametrize("shape", TREES)
def test_a_tree_that_is_not_a_messages_is_refused(fleet, pki, tmp_path, shape):
    message = question((b"abc",))
    fleet.put(message)
    fleet.waiting.clear()
    with fleet.changed:  # whatever is asked for is there
        for name in ("a", "b", "c", "d", "e", "f"):
            fleet.parts.setdefault(name * 64, b"nothing")
    with Running(pki, fleet.address, tmp_path) as running:
        its_tree = TREES[shape](message.metadata.message_id)
        refused(fleet, running, message, its_tree)
    assert not (tmp_path / "link" / "passwd").exists()


def test_chunks_by_the_ten_thousands_are_refused(pki):
    message = question((b"abc",))
    response = announcement(message, get_object_tree(message))
    array = response.message_object_trees[0]
    while array.children and array.children[-1].children:
        array = array.children[-1]
    array.children.extend(wide(flower.MOST_PARTS + 1))
    with pytest.raises(flower._Unfit):
        flower._announced(response, NODE)


def test_a_question_for_another_node_is_refused():
    message = question((b"abc",))
    response = announcement(message, get_object_tree(message))
    flower._announced(response, NODE)  # control
    with pytest.raises(flower._Unfit):
        flower._announced(response, NODE + 1)


def announcement(message, its_tree):
    bare = remove_content_from_message(message) if message.has_content() else message
    return PullMessagesResponse(
        messages_list=[message_to_proto(bare)], message_object_trees=[its_tree]
    )


# ---------------------------------------------------------------------------- arrays
def array_part(chunks, *, shape=None, order=None, dtype="uint8", stype="wardround.bytes"):
    body = {
        "dtype": dtype,
        "shape": [3] if shape is None else shape,
        "stype": stype,
        "arraychunk_ids": [0] if order is None else order,
    }
    return part("Array", chunks, json.dumps(body).encode())


ARRAYS = {
    "numpy's own format": {"stype": "numpy.ndarray"},
    "floats": {"dtype": "float32"},
    "two dimensions": {"shape": [3, 1]},
    "no dimension": {"shape": []},
    "a text for a size": {"shape": "3"},
    "a truth value for a size": {"shape": [True]},
    "less than nothing": {"shape": [-3]},
    "shorter than it says": {"shape": [4]},
    "longer than it says": {"shape": [2]},
    "a chunk that is not there": {"order": [1]},
    "a chunk counted from behind": {"order": [-1]},
    "one chunk a thousand times": {"order": [0] * 1000},
    "an order that is none": {"order": "0"},
}


def built(array, chunk, *, chunk_part=None):
    """What the builder makes of a message around this array."""
    record_name, record = part("ArrayRecord", [array[0]], json.dumps({"data": array[0]}).encode())
    content_name, content = part(
        "RecordDict", [record_name], json.dumps({"payload-0": record_name}).encode()
    )
    message = question((b"x",))
    bare = message_to_proto(remove_content_from_message(message))
    body = bare.SerializeToString()
    name, root = part("Message", [content_name], body)
    bare.metadata.message_id = name
    names = tree(name, tree(content_name, tree(record_name, tree(array[0], tree(chunk[0])))))
    response = PullMessagesResponse(messages_list=[bare], message_object_trees=[names])
    found = flower._announced(response, NODE)
    parts = dict([(name, root), (content_name, content), (record_name, record), array])
    builder = flower._Builder(found, parts)
    builder.size()
    return builder.message({chunk[0]: chunk[1] if chunk_part is None else chunk_part}.__getitem__)


def test_an_array_as_agreed_is_built():  # the control of the table
    chunk = part("ArrayChunk", (), b"abc")
    made = built(array_part([chunk[0]]), chunk)
    assert made.content["payload-0"]["data"].data == b"abc"


@pytest.mark.parametrize("shape", ARRAYS)
def test_an_array_that_is_not_plain_bytes_is_refused(shape):
    chunk = part("ArrayChunk", (), b"abc")
    with pytest.raises(flower._Unfit):
        built(array_part([chunk[0]], **ARRAYS[shape]), chunk)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no head",
        part("ArrayRecord", (), b"abc")[1],
        b"ArrayChunk  99\0abc",
        b"ArrayChunk  -1\0a",
    ],
)
def test_a_chunk_that_is_none_is_refused(content):
    chunk = part("ArrayChunk", (), b"abc")
    with pytest.raises(flower._Unfit):
        built(array_part([chunk[0]]), chunk, chunk_part=content)


def test_numbers_without_end_and_brackets_without_end_are_refused():
    chunk = part("ArrayChunk", (), b"abc")
    for body in (b'{"shape":[' + b"9" * 5000 + b"]}", b"[" * 100_000, b'{"shape":NaN}'):
        with pytest.raises(flower._Unfit):
            built(part("Array", [chunk[0]], body), chunk)


def sample():
    """A whole question: its announcement and its parts."""
    arrays = {"data": Array(dtype="uint8", shape=(3,), stype="wardround.bytes", data=b"abc")}
    message = raw_question(RecordDict({**question(()).content, "payload-0": ArrayRecord(arrays)}))
    parts = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}
    return announcement(message, get_object_tree(message)), parts


SAMPLE = sample()


def test_the_sample_is_read_undamaged():  # control of the next
    response, parts = SAMPLE
    builder = flower._Builder(flower._announced(response, NODE), parts)
    assert builder.size() == 3
    assert builder.message(parts.__getitem__).content["payload-0"]["data"].data == b"abc"


def test_parts_that_hold_other_parts_than_announced_are_refused():
    """Heads that nest deeper than the tree, or again and again, would be built without a bound."""
    response, parts = PullMessagesResponse.FromString(SAMPLE[0].SerializeToString()), SAMPLE[1]
    root = response.message_object_trees[0]
    content = root.children[0]
    flat = [node for node in content.children for node in (node, *node.children)]
    root.children.extend(tree(node.object_id, *node.children) for node in flat)
    with pytest.raises(flower._Unfit):
        flower._Builder(flower._announced(response, NODE), parts).message(parts.__getitem__)


@settings(max_examples=400, deadline=None)
@given(
    index=st.integers(0, len(SAMPLE[1]) - 1),
    cuts=st.lists(
        st.tuples(st.integers(0, 300), st.integers(0, 4), st.binary(max_size=4)), max_size=4
    ),
)
def test_whatever_a_part_holds_is_read_or_refused(index, cuts):
    """Parts with random damage, as if under digests that fit: never another exception."""
    response, parts = SAMPLE[0], dict(SAMPLE[1])
    target = list(parts)[index]
    content = bytearray(parts[target])
    for at, length, new in cuts:
        content[at % len(content) : at % len(content) + length] = new or b"?"
    parts[target] = bytes(content)
    with suppress(flower._Unfit):
        builder = flower._Builder(flower._announced(response, NODE), parts)
        builder.size()
        builder.message(parts.__getitem__)


# ---------------------------------------------------------------------------- the cache
def test_the_cache_is_bounded_and_forgets_the_oldest_first(tmp_path):
    cache = ObjectCache(tmp_path, most_bytes=250)
    names = []
    for n in range(4):
        content = bytes([n]) * 100
        names.append(hashlib.sha256(content).hexdigest())
        cache.put(names[-1], content)
        os.utime(tmp_path / names[-1], (n, n))
    cache.make_room(keep=[names[0]])
    assert [cache.get(name) is not None for name in names] == [True, False, False, True]
    (tmp_path / "x.part").write_bytes(b"left by a crash")
    (tmp_path / "note").write_bytes(b"not ours")
    again = ObjectCache(tmp_path, most_bytes=100)
    assert [again.get(name) is not None for name in names] == [False, False, False, True]
    assert {path.name for path in tmp_path.iterdir()} == {names[3], "note"}
    assert (tmp_path / names[3]).stat().st_mode & 0o777 == 0o600
