"""Keys of the connections to the broker: their files, and who may connect. No sockets here.

    keys/                    0700
      broker.key             the broker's own pair
      authorised.toml        who may connect: names, roles and public keys, revoked ones too. No secrets
      actor.key  spot-7.key  one file per peer, with all that it needs; copy it to the machine that uses it

Rules kept here; each has a test of that name in tests/common/test_security.py:
1. A secret is readable by its owner only, from its first moment on, whatever the umask.
2. A key file that others can read is refused.
3. A file is replaced whole or not at all.
4. A key that was revoked stays revoked: its name can get a new pair, the old pair is never valid again.
5. A secret is in no error message and in no repr.

Times are passed in. Who checks a connection against the list is matpo_broker.gate.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import zmq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from matpo.errors import ConfigError, SetupError
from matpo.settings import RunFile

Role = Literal["actor", "learner", "operator"]
ROLES: tuple[Role, ...] = ("actor", "learner", "operator")
BROKER = "broker"  # a name that no peer can have
AUTHORISED = "authorised.toml"

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
_Key = Annotated[str, Field(pattern=r"^[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}$")]  # Z85: 32 bytes
_Model = TypeVar("_Model", bound="_File")


class _File(BaseModel):
    """Base of what is in the files."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True)


class ClientKeys(_File):
    """One peer's key file: NAME.key."""

    format: Literal[1] = 1
    name: _Name
    role: Role
    created: str
    public: _Key
    secret: Annotated[_Key, Field(repr=False)]
    broker: _Key
    """The broker's public key: we talk to that broker and to no other."""


class BrokerKeys(_File):
    """The broker's own pair: broker.key."""

    format: Literal[1] = 1
    created: str
    public: _Key
    secret: Annotated[_Key, Field(repr=False)]


class Entry(_File):
    """One key in the list of those that may connect, or might once."""

    name: _Name
    role: Role
    public: _Key
    created: str
    revoked: str = ""
    """When; "" while it is valid."""

    @property
    def fingerprint(self) -> str:
        """A short name of the public key, for people to compare."""
        return fingerprint(self.public)


class _Authorised(_File):
    format: Literal[1] = 1
    keys: list[Entry] = Field(default_factory=list)


class Rotated(_File):
    """What `rotate_broker` did: the files that it wrote, and the valid names whose file is not in the folder."""

    written: list[Path]
    absent: list[str]


def fingerprint(public: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a public key."""
    return hashlib.sha256(public.encode()).hexdigest()[:16]


# ---- reading


def client_keys(run_file: RunFile, role: Role) -> ClientKeys | None:
    """This process's keys: security.key_file, or ROLE.key in security.keys. None when neither is set.

    Raises ConfigError for a file that is missing or of another role, SetupError for one that is unsafe or damaged.
    """
    settings = run_file.security
    path = settings.key_file or (settings.keys / f"{role}.key" if settings.keys else None)
    if path is None:
        return None
    setting = "security.key_file" if settings.key_file else "security.keys"
    keys = _read(path, ClientKeys, missing=f"{setting} says that the key of this {role} is {path}")
    if keys.role != role:
        raise ConfigError(
            f"{path} is a key for the role {keys.role} (its name: {keys.name}), and this is the {role}. "
            f"Set {setting} to a key made with --role {role}.",
            reason="key_role",
        )
    _check_pair(path, keys.public, keys.secret)
    return keys


def load_broker(folder: Path) -> BrokerKeys:
    """The broker's own pair. Raises ConfigError when there is none, SetupError when it is unsafe or damaged."""
    path = folder / f"{BROKER}.key"
    keys = _read(path, BrokerKeys, missing=f"security.keys says that the broker's key is {path}")
    _check_pair(path, keys.public, keys.secret)
    return keys


def load_entries(folder: Path) -> list[Entry]:
    """Every key ever authorised, oldest first. Raises ConfigError without a list, SetupError for a damaged one."""
    path = folder / AUTHORISED
    if not path.exists():
        raise _no_keys_yet(folder)
    return _read(path, _Authorised, missing=f"security.keys says that the list of keys is {path}").keys


def _no_keys_yet(folder: Path) -> ConfigError:
    return ConfigError(
        f"there are no keys in {folder} yet. On the broker's machine run `matpo-broker keys new RUN.TOML`.",
        reason="key_missing",
    )


def live(entries: list[Entry]) -> dict[str, Entry]:
    """Those that may connect now, by public key."""
    return {entry.public: entry for entry in entries if not entry.revoked}


# ---- changing


def new_keys(folder: Path, *, now: str) -> list[Path]:
    """Make what is missing of: the broker's pair, and one key per role, named like the role. Returns the files made.

    Raises ConfigError when nothing is missing.
    """
    with _open(folder, create=True):
        made = []
        broker_path = folder / f"{BROKER}.key"
        if not broker_path.exists():
            _write_broker(folder, now)
            made.append(broker_path)
        entries = load_entries(folder) if (folder / AUTHORISED).exists() else []
        known = {entry.name for entry in entries}
        for role in ROLES:
            if role not in known:
                made.append(_write_peer(folder, entries, role, role, now))
        if not made:
            revoked = [role for role in ROLES if role not in {entry.name for entry in live(entries).values()}]
            raise ConfigError(
                f"{folder} was given keys for broker, {', '.join(ROLES)} already"
                + (f"; revoked since: {', '.join(revoked)}. " if revoked else ". ")
                + "Add one with --role ROLE --name NAME, or replace one with `matpo-broker keys rotate`.",
                reason="key_exists",
            )
        _write_entries(folder, entries)
        return made


def add(folder: Path, *, role: Role, name: str, now: str) -> Path:
    """Make one more key. Raises ConfigError when a valid key has this name."""
    if name == BROKER:
        raise ConfigError(f'"{BROKER}" is the name of the broker\'s own key. Choose another.', reason="key_name")
    with _open(folder):
        load_broker(folder)  # says so if there is none yet
        entries = load_entries(folder)
        if any(entry.name == name and not entry.revoked for entry in entries):
            raise ConfigError(
                f"{folder} has a key named {name} already. Choose another name, or replace it: "
                f"`matpo-broker keys rotate RUN.TOML {name}`.",
                reason="key_exists",
            )
        path = _write_peer(folder, entries, role, name, now)
        _write_entries(folder, entries)
        return path


def revoke(folder: Path, name: str, *, now: str) -> Entry:
    """End a key at once, and delete its file. Raises ConfigError when no valid key has this name."""
    if name == BROKER:
        raise ConfigError(
            "the broker's own key cannot be revoked, only replaced: `matpo-broker keys rotate RUN.TOML broker`.",
            reason="key_name",
        )
    with _open(folder):
        entries = load_entries(folder)
        ended = _end(folder, entries, name, now)
        _write_entries(folder, entries)
        (folder / f"{name}.key").unlink(missing_ok=True)
        return ended


def rotate(folder: Path, name: str, *, now: str) -> Path:
    """A new pair for a name; the old one is revoked at once. Returns the file, which must be copied again."""
    with _open(folder):
        entries = load_entries(folder)
        ended = _end(folder, entries, name, now)
        path = _write_peer(folder, entries, ended.role, name, now)
        _write_entries(folder, entries)
        return path


def rotate_broker(folder: Path, *, now: str) -> Rotated:
    """A new pair for the broker, and its public key in each peer's file. A running broker keeps the old one."""
    with _open(folder):
        names = sorted(entry.name for entry in live(load_entries(folder)).values())
        paths = {name: folder / f"{name}.key" for name in names}
        peers = {name: _read(path, ClientKeys, missing="") for name, path in paths.items() if path.exists()}
        broker = _write_broker(folder, now)
        for name, keys in peers.items():
            _write(paths[name], _peer_text(keys.model_copy(update={"broker": broker.public})))
        written = [folder / f"{BROKER}.key", *(paths[name] for name in peers)]
        return Rotated(written=written, absent=[name for name in names if name not in peers])


def _end(folder: Path, entries: list[Entry], name: str, now: str) -> Entry:
    for at, entry in enumerate(entries):
        if entry.name == name and not entry.revoked:
            entries[at] = entry.model_copy(update={"revoked": now})
            return entry
    valid = ", ".join(sorted(entry.name for entry in live(entries).values())) or "none"
    raise ConfigError(f"no valid key in {folder} is named {name}. Valid: {valid}.", reason="key_unknown")


# ---- files


def _write_broker(folder: Path, now: str) -> BrokerKeys:
    public, secret = _pair()
    keys = BrokerKeys(created=now, public=public, secret=secret)
    comment = "# The broker's own key. Secret: it stays on the broker's machine, mode 0600."
    _write(folder / f"{BROKER}.key", _text(comment, keys))
    return keys


def _write_peer(folder: Path, entries: list[Entry], role: Role, name: str, now: str) -> Path:
    """A new pair: its file, and its place in the list (which the caller writes)."""
    public, secret = _pair()
    try:
        entry = Entry(name=name, role=role, public=public, created=now)
    except ValidationError:
        raise ConfigError(
            f'"{name}" is no name for a key. Use letters, digits, ".", "_" and "-", at most 64.', reason="key_name"
        ) from None
    path = folder / f"{name}.key"
    broker = load_broker(folder).public
    _write(path, _peer_text(ClientKeys(name=name, role=role, created=now, public=public, secret=secret, broker=broker)))
    entries.append(entry)
    return path


def _peer_text(keys: ClientKeys) -> str:
    return _text(f"# MATPO key of {keys.name} ({keys.role}). Secret: mode 0600, only where it is used.", keys)


def _write_entries(folder: Path, entries: list[Entry]) -> None:
    tables = [f"[[keys]]\n{_fields(entry)}" for entry in entries]
    _write(folder / AUTHORISED, "\n".join(["# Who may connect to the broker. No secrets.\nformat = 1\n", *tables]))


def _text(comment: str, keys: ClientKeys | BrokerKeys) -> str:
    return f"{comment}\n{_fields(keys)}"


def _fields(model: _File) -> str:
    """Lines of TOML. JSON's spelling of our strings (names, Z85, times) is also TOML's."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in model.model_dump().items())


def _pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _check_pair(path: Path, public: str, secret: str) -> None:
    try:
        belongs = zmq.curve_public(secret.encode()).decode() == public
    except zmq.ZMQError:  # forty characters of Z85 that are no number of 32 bytes
        belongs = False
    if not belongs:
        raise SetupError(f"{path}: public and secret key do not belong together. Copy the file again.", reason="key")


def _read(path: Path, model: type[_Model], *, missing: str) -> _Model:
    """Raises ConfigError when it is not there, SetupError when others can read it or it is not what we wrote."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            mode = stat.S_IMODE(found.st_mode)
            if stat.S_ISREG(found.st_mode) and mode & 0o077:
                raise SetupError(
                    f"{path} can be used by others (mode {mode:04o}), want 0600. Run: chmod 600 {path}; "
                    "and if others work on this machine, make a new key: `matpo-broker keys rotate`.",
                    reason="key_mode",
                )
            text = file.read().decode()
    except FileNotFoundError:
        raise ConfigError(
            f"{missing}, and it does not exist. On the broker's machine run `matpo-broker keys new RUN.TOML`; "
            "to another machine copy the key file.",
            reason="key_missing",
        ) from None
    except OSError as error:
        raise SetupError(f"cannot read {path}: {error.strerror}.", reason="key") from error
    except UnicodeDecodeError:
        text = "\0"
    try:
        return model.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError:
        problem = "not TOML"
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['type']}"
    raise SetupError(f"{path} is damaged ({problem}). Copy it again, or rotate the key.", reason="key")


def _write(path: Path, text: str) -> None:
    """Replace a file: 0600 from its first moment, whole, and on disk when this returns."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)  # of a process that was killed here; the folder is locked
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o600)  # the umask may have taken our own bits
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _open(folder: Path, *, create: bool = False) -> Iterator[None]:
    """The folder, 0700, locked against a second command. Raises ConfigError without it, SetupError when unsafe."""
    try:
        if create and not folder.exists():
            folder.mkdir(mode=0o700, parents=True)
            folder.chmod(0o700)  # the umask may have taken our own bits
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise _no_keys_yet(folder) from None
    except OSError as error:
        raise SetupError(f"cannot use the key folder {folder}: {error.strerror}.", reason="key") from error
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if mode & 0o077:
            raise SetupError(
                f"the key folder {folder} is open to others (mode {mode:04o}), want 0700. Run: chmod 700 {folder}",
                reason="key_mode",
            )
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    except OSError as error:
        raise SetupError(f"cannot write keys in {folder}: {error.strerror}.", reason="key") from error
    finally:
        os.close(descriptor)
