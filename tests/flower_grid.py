"""Flower's Grid in one process, for tests: scripted nodes, or real ClientApps behind it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


def carried(message: Message) -> Message:
    """The message as it is after a wire: deflated into parts and inflated again."""
    name = message.object_id
    parts = {key: item.deflate() for key, item in get_all_nested_objects(message).items()}
    copy = inflate_object_from_contents(name, parts)
    copy.metadata.__dict__["_message_id"] = message.metadata.message_id
    return copy


class InProcessGrid(Grid):
    """Nodes appear and go as the test says; what is pushed waits until somebody answers it."""

    def __init__(self) -> None:
        self._run = Run.create_empty(run_id=1)
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self._names = (f"message-{i}" for i in itertools.count(1))
        self.nodes: dict[int, str] = {}
        self.pushed: list[Message] = []
        self.replies: dict[str, Message] = {}
        self.apps: dict[int, Callable[[Message, Context], Message]] = {}
        self.refuses = False

    # ------------------------------------------------------------ the test's side

    def come(self, node: int, stamp: str = "t0") -> None:
        self.nodes[node] = stamp

    def go(self, node: int) -> None:
        del self.nodes[node]

    def last(self, node: int) -> Message:
        return [m for m in self.pushed if m.metadata.dst_node_id == node][-1]

    def count(self, node: int) -> int:
        return sum(m.metadata.dst_node_id == node for m in self.pushed)

    def answer(self, question: Message, content: RecordDict | Error) -> None:
        reply = content if isinstance(content, Message) else Message(content, reply_to=question)
        self.replies[question.metadata.message_id] = carried(reply)

    def superlink_error(self, question: Message, code: int) -> None:
        """Flower's own error replies come from node 1, whoever was asked."""
        reply = Message(Error(code, "Error: Node Unavailable"), reply_to=question)
        reply.metadata.__dict__["_src_node_id"] = 1
        self.replies[question.metadata.message_id] = reply

    # ------------------------------------------------------------ Flower's side

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Iterable[Any]:
        return [NodeInfo(node_id=n, last_activated_at=at) for n, at in self.nodes.items()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            if self.refuses:
                names.append("")
                continue
            message.metadata.__dict__["_message_id"] = name = next(self._names)
            self.pushed.append(carried(message))
            names.append(name)
            app = self.apps.get(message.metadata.dst_node_id)
            if app is not None:
                context = Context(1, message.metadata.dst_node_id, {}, RecordDict(), {})
                self.replies[name] = carried(app(carried(message), context))
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(name) for name in list(message_ids) if name in self.replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        del timeout
        return self.pull_messages(self.push_messages(messages))
