"""Batches whose loss or gradient was not finite, kept for people to look at.

    bad_batches/u000012-g00000345/episodes      readable with matpo.schema.read_episodes, and by --mode sft
    bad_batches/u000012-g00000345/what.json     what was not finite, in which groups, at which weights

Rules kept here, each with a test in tests/learner/test_bad_batches.py:
1. A folder appears whole or not at all. 2. At most MAX_KEPT stay, the newest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matpo import schema
from matpo.episode import Group

MAX_KEPT = 8


def save(folder: Path, groups: Sequence[Group], what: Mapping[str, Any], *, update: int) -> Path:
    """Write one batch down. `update` is the one that it was to make. Returns its folder."""
    final = folder / f"u{update:06d}-{groups[0].id.replace('-', '')}"
    temporary = folder / f".tmp-{final.name}"
    for path in (temporary, final):  # of an earlier life
        shutil.rmtree(path, ignore_errors=True)
    temporary.mkdir(parents=True)
    schema.write_episodes(temporary / "episodes", (episode for group in groups for episode in group.episodes))
    text = json.dumps({"update": update, **what, "groups": [group.id for group in groups]}, indent=1)
    (temporary / "what.json").write_text(text, encoding="utf-8")
    temporary.rename(final)
    kept = sorted(folder.glob("u*"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    for path in kept[:-MAX_KEPT]:
        shutil.rmtree(path, ignore_errors=True)
    return final
