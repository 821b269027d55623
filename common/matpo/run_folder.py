"""Who owns a run folder: run.json, written once by whoever comes first.

Rules kept here, each with a test in tests/common/test_run_folder.py:
1. Every process claims the folder before it writes there. The same run and model may claim it again at any time.
2. A folder of another run, another model or another schema is refused; nothing in it is touched.
3. run.json is there whole or not at all, also when two processes claim at the same instant.
"""

from __future__ import annotations

import os
import secrets
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from matpo.errors import ConfigError, SetupError
from matpo.schema import SCHEMA_VERSION
from matpo.settings import RunFile
from matpo.snapshot import fingerprint

NAME = "run.json"


class Identity(BaseModel):
    """What run.json holds. `id` tells this run from an earlier one of the same name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    id: str
    fingerprint: str  # of the model: architecture and vocabulary (matpo.snapshot.fingerprint)
    schema_version: int
    created_at: str


def claim(run_file: RunFile) -> Identity:
    """The identity of the run folder, made if the folder is new.

    Raises ConfigError when the folder is another run's, SetupError when it cannot be written.
    """
    folder = run_file.run.folder
    path = folder / NAME
    wanted = Identity(
        name=run_file.run.name,
        id=secrets.token_hex(8),
        fingerprint=fingerprint(run_file.model_folder),
        schema_version=SCHEMA_VERSION,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _write_once(path, wanted.model_dump_json(indent=1))
        found = Identity.model_validate_json(path.read_bytes())
    except OSError as error:
        raise SetupError(
            f"run.folder={folder}: {error.strerror}. Name a folder that can be written.", reason="folder"
        ) from None
    except ValidationError:
        raise ConfigError(f"{path} is no identity of a run. Set run.folder to a new folder.") from None
    for field, what in (("name", "run"), ("fingerprint", "model"), ("schema_version", "schema version")):
        if getattr(found, field) != getattr(wanted, field):
            raise ConfigError(
                f"run.folder={folder} belongs to {what} {getattr(found, field)!r}, this run file says "
                f"{getattr(wanted, field)!r}. Set run.folder to a new folder, or use the run file it was made with."
            )
    return found


def _write_once(path: Path, text: str) -> None:
    """Create a file with its content at once. Whoever comes second keeps the first one's."""
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(8)}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(temporary)  # unlike rename, fails when the name is taken
    except FileExistsError:
        pass
    finally:
        temporary.unlink(missing_ok=True)
