"""What strace wrote about a broker, as events in the order in which the kernel saw them. Knows no promise.

`Traced` starts a broker under strace; `read_trace` gives the system calls. A call that was interrupted by another
thread's stands on two lines ("<unfinished ...>", "resumed>"): it begins at the first and ends at the second.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

SYNCS = ("fdatasync", "fsync")
WRITES = ("write", "writev", "pwrite64", "pwritev", "pwritev2")
SENDS = (*WRITES, "sendto", "sendmsg")

_LINE = re.compile(r"^(\d+) +(\d+\.\d+) (.*)$")
_CALL = re.compile(r"^(\w+)\((.*)\) += (-?\d+|\?)(.*)$")
_TARGET = re.compile(r"^\d+<((?:[^<>]|->)*)>")
_BYTES = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One system call. `begins` and `ends` are line numbers: a total order. `target` is the path or socket."""

    name: str
    target: str
    data: bytes
    result: int
    injected: bool
    begins: int
    ends: int
    ends_s: float


def under_strace(log: Path, *options: str, calls: tuple[str, ...] = ()) -> list[str]:
    """The command line in front of a broker's."""
    traced = [f"--trace={','.join(calls)}"] if calls else []
    return ["strace", "-f", "--seccomp-bpf", "-ttt", "-y", "-xx", "-s", "65536", "-o", str(log), *traced, *options]


def skip_without_strace() -> None:
    """strace may be missing, or tracing forbidden (containers, yama)."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    tried = subprocess.run(["strace", "-f", "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"strace may not trace here: {tried.stderr.strip()[:200]}")


def pid_of(log: Path) -> int:
    """The traced broker: strace writes its id first."""
    return int(log.read_text().split(maxsplit=1)[0])


def read_trace(log: Path) -> Iterator[Call]:
    """Calls in the order of their ends."""
    open_calls: dict[str, tuple[int, str]] = {}
    with log.open(encoding="ascii") as file:
        for number, line in enumerate(file):
            if (found := _LINE.match(line.rstrip("\n"))) is None:
                continue
            thread, time_s, text = found.groups()
            begins = number
            if text.endswith("<unfinished ...>"):
                open_calls[thread] = (number, text.removesuffix("<unfinished ...>").rstrip())
                continue
            if text.startswith("<... "):
                begins, start = open_calls.pop(thread)
                text = start + text.partition("resumed>")[2]
            if (call := _call_of(text)) is not None:
                yield replace(call, begins=begins, ends=number, ends_s=float(time_s))


def exit_of(log: Path) -> tuple[int, float]:
    """The exit code of the traced process, and when it ended."""
    text = log.read_text()
    found = re.findall(r"^\d+ +(\d+\.\d+) \+\+\+ exited with (\d+) \+\+\+$", text, re.MULTILINE)
    assert found, f"no exit in {log}: {text[-500:]}"
    time_s, code = found[-1]
    return int(code), float(time_s)


def _call_of(text: str) -> Call | None:
    found = _CALL.match(text)
    if found is None:
        return None
    name, arguments, result, rest = found.groups()
    target = _TARGET.match(arguments)
    data = b"".join(_unhex(part) for part in _BYTES.findall(arguments))
    return Call(
        name=name,
        target="" if target is None else _unhex(target[1]).decode(errors="replace"),
        data=data[: int(result)] if name in SENDS and result.isdigit() else data,
        result=-1 if result == "?" else int(result),
        injected="(INJECTED)" in rest,
        begins=0,
        ends=0,
        ends_s=0.0,
    )


def _unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", "")) if text.startswith("\\x") else text.encode()
