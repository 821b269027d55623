"""The learner of a benchmark: places all orders; if asked, takes every whole group and commits, so that files can go.

python -m matpo_ops.bench.consumer '{"run_file": "run.toml", "num_groups": 100, "group_size": 8, "consume": true}'
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import zmq

from matpo import wire
from matpo_ops.bench.producer import RUN, SCHEMA_VERSION, connect

COMMIT_S = 0.5
ORDERS_PER_MESSAGE = 512
TASK = wire.OrderedTask(id="task", environment="bench", question="Which is the capital of the country of Graz? " * 4)


class Learner:
    """A blocking link with as little in it as can be."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.num_bytes = 0
        self._socket = socket
        self._seq = 0
        self._consumed: set[int] = set()
        self._below = 0
        name = f"learner-{os.getpid()}"
        hello = wire.Hello(peer="learner", name=name, incarnation=name, run=RUN, schema_version=SCHEMA_VERSION)
        self._epoch = self._ask(hello).epoch
        self._ask(wire.Resume(epoch=self._epoch, checkpoint="", consumed_below=0, consumed=[]))

    def order(self, num_groups: int, group_size: int) -> None:
        """Place every order of the run."""
        for first in range(0, num_groups, ORDERS_PER_MESSAGE):
            indices = range(first, min(first + ORDERS_PER_MESSAGE, num_groups))
            orders = [wire.Order(group=f"g-{i:08d}", index=i, group_size=group_size, task=TASK) for i in indices]
            self._ask(wire.PlaceOrders(epoch=self._epoch, orders=orders))

    def consume(self, begin_s: float, end_s: float) -> int:
        """Take groups as they become whole. Returns the bytes that came between the two instants."""
        received, commit_at_s, num_bytes = "", time.monotonic() + COMMIT_S, 0
        while (now_s := time.monotonic()) < end_s:
            reply = self._ask(wire.Fetch(epoch=self._epoch, wait_s=0.2, received=received))
            if isinstance(reply, wire.GroupReady):
                received = reply.group
                self._consumed.add(reply.index)
                num_bytes += sum(each.num_bytes for each in reply.episodes) if now_s >= begin_s else 0
            if now_s >= commit_at_s:
                self._commit()
                commit_at_s = now_s + COMMIT_S
        return num_bytes

    def _ask(self, message: wire.AnyMessage) -> Any:
        self._seq += 1
        self._socket.send_multipart(wire.encode(message.model_copy(update={"seq": self._seq})))
        header, _ = self._socket.recv_multipart(copy=False)
        reply, _ = wire.decode([header.bytes, b""])
        if reply.seq != self._seq or isinstance(reply, wire.Refused):
            raise SystemExit(f"the broker answered {message.kind} with {reply}")
        return reply

    def _commit(self) -> None:
        while self._below in self._consumed:
            self._consumed.discard(self._below)
            self._below += 1
        self._ask(
            wire.Commit(
                epoch=self._epoch,
                checkpoint=f"c-{self._seq}",
                consumed_below=self._below,
                consumed=sorted(self._consumed),
                oldest_kept_below=self._below,
            )
        )


def main() -> None:
    """Entry point of the process."""
    spec = json.loads(sys.argv[1])
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = connect(context, Path(spec["run_file"]), "learner")
    learner = Learner(socket)
    learner.order(spec["num_groups"], spec["group_size"])
    print("ready", flush=True)
    when = json.loads(sys.stdin.readline() or "{}")
    if when:
        num_bytes = learner.consume(when["begin_s"], when["end_s"]) if spec["consume"] else 0
        print(json.dumps({"consumed_bytes": num_bytes}), flush=True)
    socket.close()
    context.term()


if __name__ == "__main__":
    main()
