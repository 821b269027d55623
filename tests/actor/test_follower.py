"""The follower against real snapshot folders: good, torn, of another model, going backwards."""

import asyncio
import shutil
from pathlib import Path

import pytest
import structlog.testing
import torch
from safetensors.torch import load_file

from matpo import snapshot
from matpo.errors import SnapshotError, TryAgainError
from matpo.metrics import Metrics
from matpo.testing import tiny_model
from matpo_actor.engines.base import Sampled
from matpo_actor.follower import Follower

POLL_S = 0.01


class LoadsAnything:
    """An engine that only notes what it is told to load."""

    def __init__(self) -> None:
        self.version = -1
        self.loads: list[tuple[Path, int]] = []
        self.refuse: SnapshotError | None = None

    async def start(self) -> None: ...

    async def generate(self, prompt_ids, *, max_tokens, stop_ids, seed=None) -> Sampled:
        raise NotImplementedError

    async def load(self, folder: Path, version: int) -> float:
        if self.refuse is not None:
            raise self.refuse
        self.loads.append((folder, version))
        self.version = version
        return 0.0

    async def close(self) -> None: ...


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "ours")


class World:
    """A snapshot folder, an engine, and the follower between them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.metrics = folder, model, Metrics("actor")
        self.engine = LoadsAnything()
        self.follower = Follower(folder, self.engine, snapshot.fingerprint(model), poll_s=POLL_S, metrics=self.metrics)

    def publish(self, version: int, *, epoch: int = 0, model: Path | None = None) -> Path:
        source = model or self.model
        return snapshot.publish(
            self.folder,
            load_file(source / "model.safetensors"),
            version=version,
            epoch=epoch,
            update=version,
            model_folder=source,
            dtype=torch.float32,
        )

    def refusals(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("matpo_actor_snapshot_errors_total", {"reason": reason}) or 0.0


@pytest.fixture
def world(tmp_path: Path, model: Path) -> World:
    return World(tmp_path / "snapshots", model)


async def test_first_waits_for_the_first_snapshot_and_says_which_folder(world: World) -> None:
    with structlog.testing.capture_logs() as logs:
        waiting = asyncio.create_task(world.follower.first(timeout_s=30))
        while not logs:
            await asyncio.sleep(POLL_S)
        assert logs[0]["event"] == "snapshot.waiting"
        assert logs[0]["folder"] == str(world.folder)
        world.publish(0)
        assert await waiting == 0
    assert world.engine.loads == [(world.folder / "v000000", 0)]


async def test_first_gives_up_with_the_folder_in_the_message(world: World) -> None:
    with pytest.raises(TryAgainError, match=r"no snapshot in .*snapshots after"):
        await world.follower.first(timeout_s=0.05)


async def test_versions_in_between_are_skipped(world: World) -> None:
    for version in range(4):
        world.publish(version)
    assert await world.follower.check()
    assert [version for _, version in world.engine.loads] == [3]
    assert not await world.follower.check()


async def test_run_loads_what_a_notice_announces_before_the_next_poll(world: World) -> None:
    world.publish(0)
    slow = Follower(world.folder, world.engine, snapshot.fingerprint(world.model), poll_s=60, metrics=world.metrics)
    running = asyncio.create_task(slow.run())
    async with asyncio.timeout(10):
        while world.engine.version < 0:
            await asyncio.sleep(POLL_S)
        world.publish(1)
        slow.notice(1)
        while world.engine.version < 1:
            await asyncio.sleep(POLL_S)
    running.cancel()


def tear(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100)


def flip_a_bit(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(tear, "torn"), (flip_a_bit, "hash"), (lose_the_manifest, "missing"), (shutil.rmtree, "missing")],
)
async def test_a_damaged_snapshot_keeps_the_old_weights_and_is_counted(world: World, damage, reason: str) -> None:
    world.publish(0)
    await world.follower.check()
    damage(world.publish(1))
    with structlog.testing.capture_logs() as logs:
        assert not await world.follower.check()
    assert world.engine.version == 0
    assert world.refusals(reason) == 1
    assert [(entry["event"], entry["reason"], entry["version"]) for entry in logs] == [("snapshot.refused", reason, 1)]


async def test_a_snapshot_of_another_model_is_refused(world: World, tmp_path: Path) -> None:
    world.publish(0, model=tiny_model(tmp_path / "other", hidden_size=32))
    assert not await world.follower.check()
    assert world.refusals("fingerprint") == 1
    assert world.engine.loads == []


async def test_a_version_that_goes_backwards_is_refused(world: World) -> None:
    world.publish(0)
    world.publish(1)
    await world.follower.check()
    snapshot.replace_text(world.folder / "LATEST", "0\n")
    assert not await world.follower.check()
    assert world.engine.version == 1
    assert world.refusals("backwards") == 1


async def test_an_older_learner_epoch_is_refused(world: World) -> None:
    world.publish(0, epoch=2)
    await world.follower.check()
    zombie = World(world.folder.with_name("zombie"), world.model)
    shutil.copytree(zombie.publish(1, epoch=1), world.folder / "v000001")
    snapshot.replace_text(world.folder / "LATEST", "1\n")
    assert not await world.follower.check()
    assert world.refusals("epoch") == 1


async def test_what_the_engine_refuses_is_counted_and_the_next_version_loads(world: World) -> None:
    world.publish(0)
    world.engine.refuse = SnapshotError("does not fit", reason="tensors")
    assert not await world.follower.check()
    assert world.refusals("tensors") == 1
    world.engine.refuse = None
    world.publish(1)
    assert await world.follower.check()
    assert world.engine.version == 1


async def test_a_refused_snapshot_is_tried_again_later_and_logged_once(world: World) -> None:
    world.publish(0)
    world.engine.refuse = SnapshotError("does not fit", reason="tensors")
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            await world.follower.check()  # at once: backing off
        assert world.refusals("tensors") == 1
        async with asyncio.timeout(10):
            while world.refusals("tensors") < 2:
                await asyncio.sleep(POLL_S)
                await world.follower.check()
    assert len(logs) == 1
    world.engine.refuse = None
    async with asyncio.timeout(10):
        while not await world.follower.check():
            await asyncio.sleep(POLL_S)
