"""Being told to leave: the first SIGTERM or SIGINT asks for an orderly end, the second ends the process at once."""

from __future__ import annotations

import asyncio
import os
import signal

from matpo import logs

SIGNALS = (signal.SIGTERM, signal.SIGINT)
log = logs.get()


class Drain:
    """The wish to leave. Make one per process, inside its event loop."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()

    def listen(self) -> None:
        """Take over SIGTERM and SIGINT."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        if self.requested.is_set():
            log.warning("actor.killed", signal=signal.Signals(number).name, why="second signal")
            os._exit(128 + number)  # not sys.exit: whatever hangs must not hold us
        log.info("actor.draining", signal=signal.Signals(number).name)
        self.requested.set()
