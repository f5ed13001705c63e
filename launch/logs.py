"""What a run's newest job wrote: its batch shell, and the ranks of its newest attempt.

    python -m launch.logs RUN                       the beginning of a run's name is enough
    python -m launch.logs RUN study=DIR rank=1      one rank alone; attempt=0 for an earlier attempt
    python -m launch.logs RUN lines=500             more of each; 40 unless told
    python -m launch.logs RUN --follow              stays with rank 0, as tail -f

Exit status: 0; 1 if there is no log yet; 2 for a study or run that is not there.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.cancel import named_runs
from launch.command import parsed
from launch.failures import read_tail
from launch.status import newest_study
from scaling.command import run_main
from scaling.errors import UserError
from scaling.records import RunDirectory, StudyDirectory, newest_event

LINES = 40


def main(words: Sequence[str]) -> int:
    keys = {"study": "the study's folder", "rank": "a rank", "attempt": "an attempt, from 0", "lines": "of each log"}
    given = parsed(words, keys, flags=("--follow",), rest="run")
    study = StudyDirectory(Path(given["study"])) if "study" in given else newest_study()
    for key in ("rank", "attempt", "lines"):
        if key in given and not given[key].isdecimal():
            raise UserError(f"{key}={given[key]}: expected a whole number, from 0")
    if "run" not in given:
        raise UserError(f"which run? One of python -m launch.status study={study.path}")
    run, *others = named_runs(study, [given["run"]])
    if others:
        raise UserError(
            f"{given['run']} begins {1 + len(others)} runs, {run.run_id} and {others[0].run_id}: say more of it"
        )
    logs = logs_of(run, given.get("rank"), given.get("attempt"))
    if not logs:
        of_what = "".join(f" of {key} {given[key]}" for key in ("attempt", "rank") if key in given)
        print(f"run {run.run_id} has no log{of_what} yet", file=sys.stderr)
        return 1
    if "--follow" in given:
        sys.stdout.flush()
        os.execvp("tail", ["tail", "-n", given.get("lines", str(LINES)), "-F", str(logs[min(1, len(logs) - 1)])])
    for path in logs:
        print(f"==> {path} <==")
        print("\n".join(read_tail(path).splitlines()[-int(given.get("lines", LINES)) :]))
    return 0


def logs_of(run: RunDirectory, rank: str | None = None, attempt: str | None = None) -> list[Path]:
    """The logs of the run's newest job: the batch shell's, then the ranks' of one attempt, the newest unless told."""
    log = newest_event(run.event_lines(), "submitted").get("log")
    if not log:
        return []
    batch = Path(log)
    ranks: dict[int, list[tuple[int, Path]]] = {}
    for path in batch.parent.glob(f"{batch.stem}.*.*.log"):
        found = re.fullmatch(rf"{re.escape(batch.stem)}\.(\d+)\.(\d+)\.log", path.name)
        if found:
            ranks.setdefault(int(found[1]), []).append((int(found[2]), path))
    chosen = sorted(ranks.get(int(attempt) if attempt is not None else max(ranks, default=0), []))
    if attempt is not None and not chosen:
        return []  # not the batch shell's alone, as if that were all the attempt wrote
    if rank is not None:
        return [path for number, path in chosen if number == int(rank)]
    return [path for path in (batch, *(path for _, path in chosen)) if path.exists()]


if __name__ == "__main__":
    run_main(main, __doc__ or "", interrupted="")
