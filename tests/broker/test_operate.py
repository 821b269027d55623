"""The operator's commands, as processes against a real broker: what they print, what they change, how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.fault.harness import Place, episode_of, payload_of

from matpo import wire
from matpo_broker import __main__, operate
from matpo_broker.journal import path_of
from matpo_broker.tables import stored_rows

processes = pytest.mark.processes
EVIL = "a[red]\x1b[31m\u202e\n"


@dataclass(frozen=True, kw_only=True)
class Said:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        assert self.code == 0, self.err
        return json.loads(self.out)


class Site:
    """A broker with an actor and a learner, and the commands on its run file."""

    def __init__(self, folder: Path) -> None:
        self.place = Place(folder)
        self.life = self.place.start()
        self.place.wait_ready()
        self.learner = self.place.learner(4, 2)
        self.actor = self.place.peer("actor", EVIL)

    def lease(self, num_members: int) -> list[wire.Lease]:
        leases: list[wire.Lease] = self.actor.ask(wire.LeaseRequest(num_members=num_members)).leases
        return leases

    def play(self, num_members: int) -> None:
        for lease in self.lease(num_members):
            assert self.actor.ask(*episode_of(lease)).kind == "stored"

    def quarantine(self) -> str:
        epoch = self.learner.welcome.epoch
        group: str = self.learner.ask(wire.Fetch(epoch=epoch)).group
        assert self.learner.ask(wire.Quarantine(epoch=epoch, group=group, reason="logprobs")).kind == "done"
        return group

    def run(self, *command: str, stdin: str = "", **environment: str) -> Said:
        return run(*command, str(self.place.run_file), stdin=stdin, **environment)

    def close(self) -> None:
        for peer in (self.learner, self.actor):
            peer.close()
        self.place.close()


def run(*arguments: str, stdin: str = "", **environment: str) -> Said:
    found = subprocess.run(
        [sys.executable, "-m", "matpo_broker", *arguments],
        input=stdin, capture_output=True, text=True, timeout=60, env={**os.environ, **environment},
    )  # fmt: skip
    return Said(code=found.returncode, out=found.stdout, err=found.stderr)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path / "site")
    yield site
    site.close()


# ---- the command line


def commands() -> dict[str, Any]:
    def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        for part, inner in getattr(command, "commands", {}).items():
            yield from walk(f"{name} {part}".strip(), inner)
        if not hasattr(command, "commands"):
            yield name, command

    return dict(walk("", typer.main.get_command(__main__.app)))


def test_the_commands_are_those_that_the_documentation_names() -> None:
    assert {name for name in commands() if not name.startswith("keys ")} == {
        "serve", "stat", "peek", "drain", "verify", "compact",
        "quarantine ls", "quarantine show", "quarantine requeue", "quarantine purge",
    }  # fmt: skip
    assert {"keys new", "keys list", "keys revoke", "keys rotate"} <= commands().keys()


@pytest.mark.parametrize("name", commands())
def test_every_command_teaches_with_an_example(name: str) -> None:
    assert f"matpo-broker {'' if name == 'serve' else name}".strip() in (commands()[name].help or "")


@pytest.mark.parametrize("name", [name for name in commands() if name != "serve" and not name.startswith("keys ")])
def test_every_command_can_speak_json(name: str) -> None:
    assert "--json" in {option for parameter in commands()[name].params for option in parameter.opts}


@processes
def test_help_shows_both_ways_to_serve() -> None:
    shown = run("--help", COLUMNS="200").out
    assert "matpo-broker run.toml" in shown
    assert "matpo-broker serve run.toml" in shown


@processes
def test_a_misspelt_command_is_told_what_was_meant(tmp_path: Path) -> None:
    said = run("stats", str(tmp_path / "run.toml"))
    assert (said.code, "Did you mean 'stat'" in said.err) == (2, True)


@processes
@pytest.mark.parametrize("command", [[], ["serve"], ["--set", "broker.lease_s=30"]])
def test_a_run_file_alone_is_served(tmp_path: Path, command: list[str]) -> None:
    said = run(*command, str(tmp_path / "nothing.toml"))
    assert (said.code, "cannot read the run file" in said.err) == (2, True)


# ---- stat and peek


@processes
def test_stat_tells_what_the_broker_says(site: Site) -> None:
    site.play(3)
    site.actor.ask(wire.Heartbeat(leases=["nobody's"], policy_version=0))
    site.actor.ask(wire.Peek())  # refused: not an actor's to ask
    found = site.run("stat", "--json").document
    assert found["source"] == "broker"
    assert {name: found["counts"][name] for name in ("orders", "episodes_stored", "refused_kind")} == {
        "orders": 4, "episodes_stored": 3, "refused_kind": 1,
    }  # fmt: skip
    said = site.run("stat")
    assert (said.code, "episodes_stored" in said.out, "refused_kind" in said.out) == (0, True, True)


@processes
def test_peek_lists_groups_by_state_and_the_members_of_one(site: Site) -> None:
    site.play(3)
    rows = site.run("peek", "--state", "open", "--json").document["rows"]
    assert [(row["group"], row["stored"]) for row in rows] == [
        ("g-00000001", 1), ("g-00000002", 0), ("g-00000003", 0)
    ]  # fmt: skip
    rows = site.run("peek", "--group", "g-00000001", "--json").document["rows"]
    assert sorted((row["state"], row["actor"]) for row in rows) == [("free", None), ("stored", f"{EVIL}/1")]
    assert len(site.run("peek", "--limit", "2", "--json").document["rows"]) == 2
    assert site.run("peek", "--state", "strange").code == 2
    said = site.run("peek", "--group", "nobody")
    assert (said.code, "there is no group nobody" in said.err) == (5, True)


@processes
def test_names_from_peers_are_shown_without_what_a_terminal_would_obey(site: Site) -> None:
    site.play(1)
    said = site.run("peek")
    assert "a[red]\ufffd[31m" in said.out
    assert not set(said.out) & set("\x1b\u202e")


@processes
def test_stat_and_peek_read_the_journal_when_no_broker_answers_and_say_so(site: Site) -> None:
    site.play(3)
    asked = site.run("stat", "--json").document["counts"]
    listed = site.run("peek", "--json").document["rows"]
    site.life.kill()
    found = site.run("stat", "--json")
    assert found.document["source"] == "journal"
    assert "no answer to hello" in found.err
    assert str(site.place.run_file) not in found.out
    told = found.document["counts"]
    assert {k: v for k, v in told.items() if k != "journal_bytes"} == {
        k: v for k, v in asked.items() if k in told and k != "journal_bytes"
    }
    peeked = site.run("peek", "--json")
    assert (peeked.document["source"], peeked.document["rows"]) == ("journal", listed)


@processes
def test_with_neither_broker_nor_journal_it_says_what_to_do(tmp_path: Path) -> None:
    place = Place(tmp_path / "empty")
    started_s = time.monotonic()
    said = run("stat", str(place.run_file))
    assert said.code == 75
    assert f"tcp://127.0.0.1:{place.ports[1]}" in said.err
    assert "Start it with `matpo-broker RUN.TOML`" in said.err
    assert time.monotonic() - started_s < 10
    assert run("drain", str(place.run_file)).code == 75
    place.close()


@processes
def test_the_broker_of_another_run_is_not_asked(site: Site) -> None:
    said = site.run("stat", "--set", "run.name=other")
    assert (said.code, 'serves run "fault"' in said.err) == (5, True)


# ---- quarantine


@processes
def test_a_quarantined_group_is_listed_shown_saved_and_requeued(site: Site, tmp_path: Path) -> None:
    site.play(4)
    group = site.quarantine()
    (row,) = site.run("quarantine", "ls", "--json").document["rows"]
    assert (row["group"], row["state"], row["reason"], row["stored"]) == (group, "quarantined", "logprobs", 2)
    assert "logprobs" in site.run("quarantine", "ls").out

    out = tmp_path / "out"
    shown = run("quarantine", "show", str(site.place.run_file), group, "--out", str(out), "--json").document
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        f"{group}.{member}.0.arrow": payload_of(f"{group}.{member}.0") for member in range(2)
    }
    assert sorted(shown["written"]) == sorted(str(path) for path in out.iterdir())
    assert [row["crc32c"] for row in shown["rows"]] == [wire.crc32c(payload_of(f"{group}.{m}.0")) for m in range(2)]

    assert run("quarantine", "requeue", str(site.place.run_file), group, "--json").document == {"requeued": [group]}
    (row,) = site.run("quarantine", "ls", "--json").document["rows"]
    assert (row["group"], row["reason"]) == (group, "requeued")  # the next learner gets it


@processes
def test_a_quarantined_group_is_listed_and_saved_from_the_journal_when_no_broker_answers(
    site: Site, tmp_path: Path
) -> None:
    site.play(4)
    group = site.quarantine()
    site.life.kill()
    listed = site.run("quarantine", "ls", "--json")
    assert [(listed.document["source"], row["group"]) for row in listed.document["rows"]] == [("journal", group)]
    assert "no answer to hello" in listed.err
    out = tmp_path / "out"
    said = run("quarantine", "show", str(site.place.run_file), group, "--out", str(out))
    assert (said.code, str(site.place.journal) in said.err) == (0, True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        f"{group}.{member}.0.arrow": payload_of(f"{group}.{member}.0") for member in range(2)
    }
    assert site.run("quarantine", "requeue", "--all").code == 75  # nobody answers, so nothing is changed


@processes
def test_all_quarantined_groups_are_purged_however_many_messages_that_takes(site: Site) -> None:
    epoch = site.learner.welcome.epoch
    num_groups = operate.PAGE_GROUPS + 3
    orders = [
        wire.Order(
            group=f"n-{index}", index=index, group_size=1,
            task=wire.OrderedTask(id="t", environment="e", question="q"),
        )
        for index in range(4, 4 + num_groups)
    ]  # fmt: skip
    site.learner.ask(wire.PlaceOrders(epoch=epoch, orders=orders))
    while leases := site.lease(100):  # a few at a time: leases are short here
        for lease in leases:
            assert site.actor.ask(*episode_of(lease)).kind == "stored"
    received, groups = "", []
    while (reply := site.learner.ask(wire.Fetch(epoch=epoch, received=received))).kind == "group":
        site.learner.ask(wire.Quarantine(epoch=epoch, group=reply.group, reason="nan"))
        received = reply.group
        groups.append(reply.group)
    assert len(groups) == 4 + num_groups
    assert site.run("quarantine", "purge", "--all", "--yes", "--json").document == {"purged": groups}
    assert site.run("quarantine", "ls", "--json").document["rows"] == []
    assert len(site.run("peek", "--state", "dropped", "--limit", "5000", "--json").document["rows"]) == len(groups)


@processes
def test_a_key_that_the_broker_refuses_is_named_and_not_taken_for_silence(tmp_path: Path) -> None:
    place = Place(tmp_path / "guarded")
    with place.run_file.open("a") as file:
        file.write(f'[security]\nkeys = "{tmp_path / "keys"}"\n')
    assert run("keys", "new", str(place.run_file)).code == 0
    place.start()
    assert run("drain", str(place.run_file)).code == 0
    kept = (tmp_path / "keys" / "operator.key").read_bytes()
    assert run("keys", "rotate", str(place.run_file), "operator").code == 0
    (tmp_path / "keys" / "operator.key").write_bytes(kept)
    said = run("stat", str(place.run_file), "--json")
    assert said.document["source"] == "journal"
    assert "refuses our key" in said.err
    assert "Start it" not in said.err
    place.close()


@processes
def test_a_purge_asks_first_and_lets_the_payloads_go(site: Site) -> None:
    site.play(4)
    group = site.quarantine()
    said = site.run("quarantine", "purge", "--all", stdin="n\n")
    assert (said.code, "Delete the payloads of 1 group" in said.err) == (1, True)
    said = site.run("quarantine", "purge", "--all", "--json")
    assert (said.code, "--yes" in said.err) == (2, True)
    assert len(site.run("quarantine", "ls", "--json").document["rows"]) == 1
    assert site.run("quarantine", "purge", "--all", "--yes", "--json").document == {"purged": [group]}
    rows = site.run("peek", "--state", "dropped", "--json").document["rows"]
    assert [(row["group"], row["reason"]) for row in rows] == [(group, "purged")]


@processes
@pytest.mark.parametrize("command", ["requeue", "purge"])
def test_groups_are_named_or_all_are_meant(site: Site, command: str) -> None:
    assert site.run("quarantine", command).code == 2
    assert run("quarantine", command, str(site.place.run_file), "g-0", "--all").code == 2
    said = run("quarantine", command, str(site.place.run_file), "g-00000000", *["--yes"] * (command == "purge"))
    assert (said.code, "is not quarantined" in said.err) == (5, True)


@pytest.mark.parametrize("name", ["../../up", "/etc/passwd", "..", "a/b", "g-7.0.0", "x" * 256, "é\x00\n"])
def test_an_episode_of_any_name_is_saved_inside_the_folder(tmp_path: Path, name: str) -> None:
    out = tmp_path / "a" / "b" / "out"
    (path,) = operate.write_payloads(out, {name: b"payload"})
    assert path.resolve().parent == out.resolve()
    assert list(out.iterdir()) == [path]
    assert path.read_bytes() == b"payload"


# ---- drain


@processes
def test_drain_waits_until_every_lease_has_come_back(site: Site) -> None:
    leases = site.lease(2)
    command = [sys.executable, "-m", "matpo_broker", "drain", str(site.place.run_file), "--json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    assert "2 leases out" in child.stderr.readline()
    assert site.lease(1) == []
    for lease in leases:
        assert site.actor.ask(*episode_of(lease)).kind == "stored"
    out, _ = child.communicate(timeout=30)
    assert (json.loads(out)["leases"], child.returncode) == (0, 0)
    assert site.run("drain", "--undo", "--json").document["draining"] is False
    assert len(site.lease(1)) == 1


@processes
def test_drain_without_waiting_says_what_is_out(site: Site) -> None:
    site.lease(2)
    found = site.run("drain", "--no-wait", "--json").document
    assert (found["draining"], found["leases"], found["counts"]["draining"]) == (True, 2, 1)


# ---- verify and compact


@processes
def test_verify_beside_the_broker_ends_with_0_and_with_4_when_something_is_damaged(site: Site) -> None:
    site.play(5)
    found = site.run("verify", "--json").document
    assert (found["sound"], found["episodes"], found["damage"]) == (True, 5, [])
    row = list(stored_rows(site.place.journal / "ledger.sqlite"))[2]
    path = path_of(site.place.journal, row.location.file)
    with path.open("r+b") as file:
        file.seek(row.location.offset + 60)
        file.write(b"\xff\x00")
    said = site.run("verify")
    assert said.code == 4
    assert all(part in said.out for part in (path.name, str(row.location.offset), row.episode, "hash", "DAMAGED"))
    said = run("verify", str(site.place.journal), "--json")
    assert (said.code, [damage["episode"] for damage in json.loads(said.out)["damage"]]) == (4, [row.episode])


@processes
def test_verify_of_a_folder_without_a_journal_is_one_clear_line(tmp_path: Path) -> None:
    said = run("verify", str(tmp_path))
    assert (said.code, len(said.err.splitlines())) == (4, 1)
    assert "no journal there" in said.err


@processes
def test_compact_needs_a_stopped_broker_and_tells_the_bytes(site: Site) -> None:
    site.play(8)
    said = site.run("compact")
    assert (said.code, "in use by another broker" in said.err) == (4, True)
    site.life.kill()
    found = site.run("compact", "--json").document
    assert found["bytes_before"] > found["bytes_after"] > 0
    assert "before" in site.run("compact").out
    assert site.run("verify", "--json").document["episodes"] == 8


# ---- keys


@processes
def test_the_commands_use_the_operator_key_of_the_run_file(tmp_path: Path) -> None:
    place = Place(tmp_path / "locked")
    with place.run_file.open("a") as file:
        file.write(f'[security]\nkeys = "{tmp_path / "keys"}"\n')
    assert run("keys", "new", str(place.run_file)).code == 0
    place.start()
    settle(lambda: run("stat", str(place.run_file), "--json").out.startswith('{"source": "broker"'))
    for command in ("peek", "drain", "verify"):
        assert run(command, str(place.run_file), "--json").code == 0
    stranger = run("drain", str(place.run_file), "--set", f"security.key_file={tmp_path / 'keys' / 'actor.key'}")
    assert (stranger.code, "key" in stranger.err) == (2, True)
    place.close()


def settle(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s
