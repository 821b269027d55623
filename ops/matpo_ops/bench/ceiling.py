"""The ceiling: ZeroMQ PUSH/PULL with pickle, as pyzmq offers it for Python objects. No keys, no disk, no answers.

    python -m matpo_ops.bench.ceiling '{"role": "push", "endpoint": ..., "payload_bytes": 1048576}'

The only file that may import pickle: it is what our transport is measured against, and reads only what its own sibling
process wrote.
"""

from __future__ import annotations

import json
import os
import pickle  # noqa: TID251  (see above)
import sys
import time

import zmq


def pull(socket: zmq.Socket[bytes], begin_s: float, end_s: float) -> int:
    """Receive and unpickle until `end_s`. Returns how many came between the two instants."""
    num_received = 0
    while (now_s := time.monotonic()) < end_s:
        if socket.poll(100):
            episode = pickle.loads(socket.recv())  # noqa: S301  (see above)
            num_received += now_s >= begin_s and len(episode["payload"]) > 0
    return num_received


def push(socket: zmq.Socket[bytes], payload_bytes: int, end_s: float) -> None:
    """Pickle and send until `end_s`, as fast as the receiver takes it."""
    episode = {"group": "g-00000001", "member": 0, "payload": os.urandom(payload_bytes)}
    while time.monotonic() < end_s:
        try:
            socket.send(pickle.dumps(episode), zmq.NOBLOCK, copy=False)
        except zmq.Again:
            socket.poll(10, zmq.POLLOUT)


def main() -> None:
    """Entry point of either process."""
    spec = json.loads(sys.argv[1])
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PULL if spec["role"] == "pull" else zmq.PUSH)
    socket.setsockopt(zmq.LINGER, 0)
    for option in (zmq.SNDHWM, zmq.RCVHWM):
        socket.setsockopt(option, max(2, 4 * 2**20 // spec["payload_bytes"]))
    if spec["role"] == "pull":
        socket.bind(spec["endpoint"])
    else:
        socket.connect(spec["endpoint"])
    print("ready", flush=True)
    when = json.loads(sys.stdin.readline() or "{}")
    if when and spec["role"] == "pull":
        print(json.dumps({"episodes": pull(socket, when["begin_s"], when["end_s"])}), flush=True)
    elif when:
        push(socket, spec["payload_bytes"], when["end_s"])
        print(json.dumps({}), flush=True)
    socket.close()
    context.term()


if __name__ == "__main__":
    main()
