"""Key files: who can read them, what a damaged one says, what new, revoke and rotate change."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from matpo import security
from matpo.errors import ConfigError, MatpoError, SetupError
from matpo.settings import RunFile

NOW, LATER = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    security.new_keys(tmp_path / "keys", now=NOW)
    return tmp_path / "keys"


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def run_file(tmp_path: Path, **settings: Path) -> RunFile:
    return RunFile.model_validate({"run": {"name": "r", "folder": tmp_path}, "security": settings})


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def keys_of(path: Path, role: security.Role = "actor") -> security.ClientKeys:
    keys = security.client_keys(run_file(path.parent, key_file=path), role)
    assert keys is not None
    return keys


def valid(folder: Path) -> set[str]:
    return set(security.live(security.load_entries(folder)))


# ---- rule 1


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777])
def test_a_secret_is_readable_by_its_owner_only_from_its_first_moment_whatever_the_umask(
    tmp_path: Path, umask: Callable[[int], int], mask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, first_modes = tmp_path / "keys", []
    opened = os.open

    def watched(path: Any, flags: int, *rest: Any) -> int:
        descriptor = opened(path, flags, *rest)
        if flags & os.O_CREAT:
            first_modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    monkeypatch.setattr(os, "open", watched)
    umask(mask)
    security.new_keys(folder, now=NOW)
    umask(0o022)
    assert mode(folder) == 0o700
    assert {mode(path) for path in folder.iterdir()} == {0o600}
    assert len(first_modes) == 5
    assert [found & 0o077 for found in first_modes] == [0] * 5


# ---- rule 2


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o644, 0o620, 0o601])
def test_a_key_file_that_others_can_read_is_refused(folder: Path, bits: int) -> None:
    for name, load in (
        ("actor", lambda: keys_of(folder / "actor.key")),
        ("broker", lambda: security.load_broker(folder)),
    ):
        path = folder / f"{name}.key"
        path.chmod(bits)
        with pytest.raises(SetupError, match=rf"{path} .*mode {bits:04o}.*chmod 600 {path}") as refused:
            load()
        assert refused.value.reason == "key_mode"


def test_a_key_file_that_only_its_owner_can_read_is_taken_also_read_only(folder: Path) -> None:
    (folder / "actor.key").chmod(0o400)
    assert keys_of(folder / "actor.key").name == "actor"


def test_a_key_folder_that_others_can_enter_is_refused(folder: Path) -> None:
    folder.chmod(0o755)
    with pytest.raises(SetupError, match=rf"mode 0755.*chmod 700 {folder}"):
        security.add(folder, role="actor", name="spot-7", now=NOW)


# ---- rule 3


def test_a_file_is_replaced_whole_or_not_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for change in (
        lambda: security.rotate(folder, "actor", now=LATER),
        lambda: security.rotate_broker(folder, now=LATER),
        lambda: security.revoke(folder, "actor", now=LATER),
        lambda: security.add(folder, role="actor", name="spot-7", now=LATER),
    ):
        with pytest.raises(SetupError, match="No space left"):
            change()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_a_killed_command_left_is_no_obstacle(folder: Path) -> None:
    (folder / ".actor.key.new").write_text("half")
    security.rotate(folder, "actor", now=LATER)
    assert not (folder / ".actor.key.new").exists()


def test_commands_at_the_same_time_lose_no_key(folder: Path) -> None:
    def add(number: int) -> None:
        security.add(folder, role="actor", name=f"spot-{number}", now=NOW)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {entry.name for entry in security.load_entries(folder)} >= {f"spot-{number}" for number in range(16)}


# ---- rule 4


def test_a_key_that_was_revoked_stays_revoked(folder: Path) -> None:
    old = keys_of(folder / "actor.key").public
    security.revoke(folder, "actor", now=LATER)
    assert old not in valid(folder)
    assert not (folder / "actor.key").exists()
    security.add(folder, role="actor", name="actor", now=LATER)
    new = keys_of(folder / "actor.key").public
    assert (old in valid(folder), new in valid(folder)) == (False, True)
    assert [(e.created, e.revoked) for e in security.load_entries(folder) if e.name == "actor"] == [
        (NOW, LATER),
        (LATER, ""),
    ]


def test_new_keys_does_not_bring_a_revoked_role_back(folder: Path) -> None:
    security.revoke(folder, "actor", now=LATER)
    with pytest.raises(ConfigError, match="already"):
        security.new_keys(folder, now=LATER)


def test_rotate_ends_the_old_pair_and_makes_a_new_one_for_the_same_role(folder: Path) -> None:
    old = keys_of(folder / "learner.key", "learner")
    path = security.rotate(folder, "learner", now=LATER)
    new = keys_of(path, "learner")
    assert (new.role, new.broker) == (old.role, old.broker)
    assert (old.public in valid(folder), new.public in valid(folder)) == (False, True)


def test_rotate_broker_rewrites_every_peer_s_file_and_names_those_it_could_not(folder: Path) -> None:
    security.add(folder, role="actor", name="spot-7", now=NOW)
    moved = (folder / "spot-7.key").rename(folder.parent / "spot-7.key")
    security.revoke(folder, "operator", now=NOW)
    old, before = security.load_broker(folder), keys_of(folder / "actor.key")
    rotated = security.rotate_broker(folder, now=LATER)
    new = security.load_broker(folder)
    assert new.public != old.public
    assert [path.name for path in rotated.written] == ["broker.key", "actor.key", "learner.key"]
    assert rotated.absent == ["spot-7"]
    assert keys_of(folder / "actor.key") == before.model_copy(update={"broker": new.public})
    assert keys_of(moved).broker == old.public


# ---- rule 5


def test_a_secret_is_in_no_error_message_and_in_no_repr(folder: Path) -> None:
    path = folder / "actor.key"
    keys, text = keys_of(path), path.read_text()
    assert keys.secret not in repr(keys)
    assert keys.secret not in str(keys)
    assert security.load_broker(folder).secret not in repr(security.load_broker(folder))
    for damaged in (
        text.replace("format = 1", "format = 2"),
        text.replace(keys.secret, keys.secret + "x"),
        text.replace(keys.secret, keys.secret[::-1]),
        text.replace(keys.secret, "#" * 40),
        text.replace(f'"{keys.secret}"', f"{keys.secret}"),
        text.replace("secret", "sekret"),
        text.replace('role = "actor"', 'role = "boss"'),
        text[:-30],
        "",
        "\0\xff",
    ):
        path.write_text(damaged)
        with pytest.raises(SetupError, match=str(path)) as refused:
            keys_of(path)
        assert keys.secret[:8] not in str(refused.value)
        assert keys.secret[::-1][:8] not in str(refused.value)


# ---- the rest


def test_new_keys_makes_a_pair_for_the_broker_and_a_key_for_each_role(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "actor.key",
        "authorised.toml",
        "broker.key",
        "learner.key",
        "operator.key",
    ]
    broker = security.load_broker(folder).public
    for role in security.ROLES:
        keys = keys_of(folder / f"{role}.key", role)
        assert (keys.name, keys.role, keys.broker) == (role, role, broker)
        assert zmq.curve_public(keys.secret.encode()).decode() == keys.public
    assert [(entry.name, entry.role) for entry in security.load_entries(folder)] == [(r, r) for r in security.ROLES]


def test_new_keys_makes_what_a_killed_command_left_out(folder: Path) -> None:
    (folder / security.AUTHORISED).unlink()
    (folder / "operator.key").unlink()
    broker = security.load_broker(folder)
    made = security.new_keys(folder, now=LATER)
    assert [path.name for path in made] == ["actor.key", "learner.key", "operator.key"]
    assert security.load_broker(folder) == broker
    assert {keys_of(folder / f"{role}.key", role).public for role in security.ROLES} == valid(folder)


def test_the_list_holds_no_secret(folder: Path) -> None:
    text = (folder / security.AUTHORISED).read_text()
    secrets = [keys_of(folder / f"{role}.key", role).secret for role in security.ROLES]
    assert not any(secret in text for secret in [*secrets, security.load_broker(folder).secret])


def test_client_keys_finds_the_key_file_then_the_role_s_key_in_the_folder_then_none(folder: Path) -> None:
    spot = security.add(folder, role="actor", name="spot-7", now=NOW)
    for settings, name in (
        ({"keys": folder, "key_file": spot}, "spot-7"),
        ({"key_file": spot}, "spot-7"),
        ({"keys": folder}, "actor"),
    ):
        keys = security.client_keys(run_file(folder, **settings), "actor")
        assert keys is not None
        assert keys.name == name
    assert security.client_keys(run_file(folder), "actor") is None


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda f: keys_of(f / "no.key"), ConfigError, r"security.key_file .*no.key.*matpo-broker keys new RUN.TOML"),
        (
            lambda f: security.client_keys(run_file(f, keys=f / "nowhere"), "actor"),
            ConfigError,
            r"security.keys .*nowhere/actor.key.*keys new RUN.TOML",
        ),
        (lambda f: keys_of(f / "learner.key"), ConfigError, r"role learner.*this is the actor"),
        (lambda f: security.load_broker(f / "nowhere"), ConfigError, r"keys new RUN.TOML"),
        (lambda f: security.load_entries(f / "nowhere"), ConfigError, r"keys new RUN.TOML"),
        (lambda f: security.revoke(f / "nowhere", "actor", now=NOW), ConfigError, r"no keys in .*keys new RUN.TOML"),
        (lambda f: security.new_keys(f, now=NOW), ConfigError, r"already"),
        (lambda f: security.add(f, role="actor", name="actor", now=NOW), ConfigError, r"key named actor already"),
        (lambda f: security.add(f, role="actor", name="broker", now=NOW), ConfigError, r"Choose another"),
        (lambda f: security.add(f, role="actor", name="../x", now=NOW), ConfigError, r"no name for a key"),
        (lambda f: security.add(f, role="actor", name="x\n", now=NOW), ConfigError, r"no name for a key"),
        (lambda f: security.revoke(f, "nobody", now=NOW), ConfigError, r"named nobody. Valid: actor, learner, op"),
        (lambda f: security.revoke(f, "broker", now=NOW), ConfigError, r"keys rotate RUN.TOML broker"),
        (lambda f: security.rotate(f, "nobody", now=NOW), ConfigError, r"named nobody"),
        (lambda f: security.load_broker(f / "actor.key"), SetupError, r"Not a directory"),
    ],
)
def test_an_error_says_what_and_what_to_do(
    folder: Path, change: Callable[[Path], object], error: type[MatpoError], says: str
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(error, match=says):
        change(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
