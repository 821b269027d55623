"""A real actor process and a real broker; the test is the learner. The engine is scripted."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import zmq
import zmq.asyncio
from transformers import AutoModelForCausalLM

from matpo import schema, snapshot, wire
from matpo.link import Link
from matpo.settings import load_run_file
from matpo.testing import tiny_model, write_run_file

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

PLUGIN = '''
import os, time
from matpo import Environment, Task, tool
from matpo.errors import InfraError

class Capitals(Environment):
    def tasks(self, split):
        return []

    @tool
    def search(self, query: str) -> str:
        """Find."""
        if query == "hang":
            time.sleep(600)
        if query == "down":
            raise InfraError("the search server is down", reason="search")
        return "Lima"

    def reward(self, task, episode):
        return float(episode.answer == "Lima")
'''


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


SCRIPT = [
    {"when": "<tool_response>\nLima\n</tool_response><.im_end.>\n<.im_start.>assistant\n$", "say": "Lima"},
    {"when": "user\nFind it: hang", "say": call("search", query="hang")},
    {"when": "user\nFind it: down", "say": call("search", query="down")},
    {"when": "user\nFind it: Peru", "say": call("search", query="Peru")},
    {"when": "user\nhang<", "say": call("worker", subtask="Find it: hang")},
    {"when": "user\ndown<", "say": call("worker", subtask="Find it: down")},
    {"say": call("worker", subtask="Find it: Peru")},
]


class Place:
    """One run folder with its processes."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        (folder / "capitals.py").write_text(PLUGIN)
        (folder / "script.jsonl").write_text("\n".join(json.dumps(line) for line in SCRIPT))
        self.path = write_run_file(
            folder / "run.toml",
            model=model,
            environment={"plugin": f"{folder / 'capitals.py'}:Capitals"},
            broker={"heartbeat_s": 0.2, "lease_s": 5.0},
            actor={
                "engine": "scripted",
                "script": str(folder / "script.jsonl"),
                "num_members": 4,
                "drain_s": 5.0,
                "snapshot_poll_s": 0.1,
            },
            rollout={"tool_timeout_s": 60},
            roles={"planner": {"calls": ["worker"]}, "worker": {"calls": ["search"]}},
        )
        self.run_file = load_run_file(self.path)
        self.processes: list[subprocess.Popen[str]] = []
        self.learner = Link(
            f"tcp://127.0.0.1:{self.run_file.broker.learner_port}",
            wire.Hello(
                peer="learner",
                name="test",
                incarnation="1",
                run="test",
                schema_version=schema.SCHEMA_VERSION,
                model=snapshot.fingerprint(model),
            ),
        )
        self.epoch = 0

    def start(self, module: str, *arguments: str) -> subprocess.Popen[str]:
        output = (self.folder / f"{module}-{len(self.processes)}.log").open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(self.path), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        process.log = Path(output.name)  # type: ignore[attr-defined]
        output.close()
        self.processes.append(process)
        return process

    def publish(self, version: int = 0) -> None:
        tensors = AutoModelForCausalLM.from_pretrained(self.model).state_dict()
        snapshot.publish(
            self.run_file.snapshot_folder,
            tensors,
            version=version,
            epoch=self.epoch,
            update=version,
            model_folder=self.model,
            dtype=torch.float32,
        )

    async def resume(self) -> None:
        self.epoch = (await self.learner.connect(30)).epoch
        await self.learner.request(wire.Resume(epoch=self.epoch, checkpoint="", consumed_below=0, consumed=[]))

    async def order(self, *questions: str, group_size: int = 2) -> None:
        orders = [
            wire.Order(
                group=f"g-{index:08d}",
                index=index,
                group_size=group_size,
                task=wire.OrderedTask(id=f"t{index}", environment="capitals", question=question),
            )
            for index, question in enumerate(questions)
        ]
        await self.learner.request(wire.PlaceOrders(epoch=self.epoch, orders=orders))

    async def fetch(self, limit_s: float = 60) -> tuple[wire.GroupReady, list]:
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            reply, payload = await self.learner.request(wire.Fetch(epoch=self.epoch, wait_s=1.0))
            if isinstance(reply, wire.GroupReady):
                episodes, at = [], 0
                for delivered in reply.episodes:
                    part = payload[at : at + delivered.num_bytes]
                    episodes.append(schema.decode(part, vocab_size=264, published_version=0))
                    at += delivered.num_bytes
                return reply, episodes
        raise AssertionError("no group came")

    async def counts(self) -> dict[str, object]:
        reply, _ = await self.learner.request(wire.Stat())
        return reply.counts

    async def until(self, name: str, value: int) -> None:
        for _ in range(600):
            if (await self.counts())[name] == value:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{name} never became {value}: {await self.counts()}")


def wait_for_line(process: subprocess.Popen[str], text: str, limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if text in process.log.read_text():  # type: ignore[attr-defined]
            return
        time.sleep(0.05)
    raise AssertionError(f"{text!r} never came in:\n{process.log.read_text()}")  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
async def place(tmp_path, model):
    place = Place(tmp_path, model)
    yield place
    await place.learner.close()
    for process in place.processes:
        process.kill()
        process.wait(10)


async def test_an_actor_plays_groups_over_a_broker_restart_and_drains_on_sigterm(place):
    actor = place.start("matpo_actor", "--name", "a1")
    wait_for_line(actor, f"tcp://127.0.0.1:{place.run_file.broker.actor_port}")
    broker = place.start("matpo_broker")
    await place.resume()
    await place.order(*["Capital of Peru?"] * 3)
    wait_for_line(actor, "snapshot.waiting")
    place.publish()
    group, episodes = await place.fetch()
    assert [e.reward for e in episodes] == [1.0, 1.0]
    assert [s.role for s in episodes[0].segments] == ["planner", "worker"]
    assert {e.actor for e in episodes} == {"a1"}
    assert group.index == 0

    broker.kill()
    broker.wait(10)
    place.start("matpo_broker")
    await place.order(*["Capital of Peru?"] * 5)
    await place.until("episodes_stored", 10)

    actor.send_signal(signal.SIGTERM)
    assert actor.wait(15) == 0
    assert "actor.left" in actor.log.read_text()


async def test_a_drained_actor_gives_unfinished_members_back_and_sends_what_is_finished(place):
    place.start("matpo_broker")
    actor = place.start("matpo_actor")
    await place.resume()
    place.publish()
    await place.order("Capital of Peru?", "hang", group_size=2)
    await place.until("episodes_stored", 2)
    await place.until("members_leased", 2)
    began = time.monotonic()
    actor.send_signal(signal.SIGTERM)
    assert actor.wait(15) == 0
    assert time.monotonic() - began < 8
    counts = await place.counts()
    assert (counts["members_leased"], counts["members_open"]) == (0, 2)


async def test_a_member_whose_lease_was_lost_is_stopped(place):
    place.start("matpo_broker", "--set", "broker.lease_s=1")
    actor = place.start("matpo_actor")
    await place.resume()
    place.publish()
    await place.order("hang")
    await place.until("members_leased", 2)
    os.kill(actor.pid, signal.SIGSTOP)  # silent, as if the machine were frozen
    await place.until("members_leased", 0)
    os.kill(actor.pid, signal.SIGCONT)
    wait_for_line(actor, "lease.lost")
    await place.until("members_leased", 2)  # and plays them anew


async def test_a_broker_that_talks_nonsense_ends_the_actor_with_one_clear_line(place):
    """A background task that dies ends the process: here the heartbeats, on an answer that is no message."""
    broker = place.start("matpo_broker")
    actor = place.start("matpo_actor")
    await place.resume()
    place.publish()
    wait_for_line(actor, "actor.ready")
    broker.kill()
    broker.wait(10)
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as impostor:
        impostor.bind(f"tcp://127.0.0.1:{place.run_file.broker.actor_port}")
        while actor.poll() is None:
            if await impostor.poll(100):
                identity, *_ = await impostor.recv_multipart()
                await impostor.send_multipart([identity, b"nonsense", b""])
    assert actor.returncode == 5
    assert "matpo-actor: from tcp://127.0.0.1" in actor.log.read_text().splitlines()[-1]


async def test_a_second_signal_ends_the_actor_at_once(place):
    actor = place.start("matpo_actor")
    wait_for_line(actor, "actor.starting")
    os.kill(actor.pid, signal.SIGSTOP)  # both signals arrive before it can act on the first
    actor.send_signal(signal.SIGTERM)
    actor.send_signal(signal.SIGINT)
    os.kill(actor.pid, signal.SIGCONT)
    assert actor.wait(5) in (128 + signal.SIGTERM, 128 + signal.SIGINT)


async def test_a_member_that_fails_for_infrastructure_reasons_is_tried_again_and_then_given_up(place):
    place.start("matpo_broker")
    place.start("matpo_actor")
    await place.resume()
    place.publish()
    await place.order("down")
    group, episodes = await place.fetch()
    assert (group.dropped != "", episodes) == (True, [])


async def test_a_weight_update_is_stamped_on_the_episodes_that_follow(place):
    place.start("matpo_broker")
    actor = place.start("matpo_actor")
    await place.resume()
    place.publish(0)
    wait_for_line(actor, "actor.ready")
    place.publish(3)
    await place.learner.request(wire.SnapshotNotice(epoch=place.epoch, version=3))
    wait_for_line(actor, "version=3")
    await place.order("Capital of Peru?")
    reply, payload = None, b""
    while not isinstance(reply, wire.GroupReady):
        reply, payload = await place.learner.request(wire.Fetch(epoch=place.epoch, wait_s=5.0))
    episode = schema.decode(payload[: reply.episodes[0].num_bytes], vocab_size=264, published_version=3)
    assert {int(v) for s in episode.segments for v in s.versions[s.sampled]} == {3}


async def test_an_actor_of_another_model_is_refused_with_exit_code_5(place, tmp_path_factory):
    place.start("matpo_broker")
    await place.resume()
    other = tiny_model(tmp_path_factory.mktemp("other") / "model", hidden_size=32)
    actor = place.start("matpo_actor", "--set", f"model.path={other}")
    assert actor.wait(60) == 5
    assert "model" in actor.log.read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ('roles.worker.calls=["browse"]', '"browse" is neither a role nor a tool'),
        ("roles.planner.max_context_tokens=100", "roles.planner.max_context_tokens=100, but prompt and tools take"),
        ("actor.script=nowhere.jsonl", "cannot read the script nowhere.jsonl"),
    ],
)
async def test_a_run_file_that_cannot_work_ends_with_exit_code_2_and_one_clear_line(place, override, says):
    actor = place.start("matpo_actor", "--set", override)
    assert actor.wait(60) == 2
    assert says in actor.log.read_text()
    assert "Traceback" not in actor.log.read_text()
