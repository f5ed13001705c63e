"""The code that jobs run is the code that was submitted, though the checkout changes afterwards.

A copy of the packages and of conf/, named by the hash of its contents, so that submissions of
the same code share one. Jobs have it first on their path. Where it came from (commit,
uncommitted changes, versions) is put beside it, since a copy knows no git.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from scaling.provenance import CODE_PROVENANCE, provenance
from scaling.records import StudyDirectory

ROOT = Path(__file__).parent.parent
FOLDERS = ("bsrnn", "scaling", "launch", "analysis", "conf")
KINDS = (".py", ".yaml", ".json", ".c", ".h")


def take_snapshot(study: StudyDirectory) -> Path:
    """The folder with the copy, made if it is not there yet."""
    files = {
        path.relative_to(ROOT): path.read_bytes()
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in KINDS and path.is_file()
    }
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    target = study.path / "code" / digest.hexdigest()[:16]
    if not target.exists():
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        for name, content in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content)
        (temporary / CODE_PROVENANCE).write_text(json.dumps(provenance()) + "\n")
        try:
            os.rename(temporary, target)
        except OSError:  # another submission of the same code was first
            shutil.rmtree(temporary)
    return target.resolve()
