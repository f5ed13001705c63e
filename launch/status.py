"""How the runs of a study are: one table, from their records and one look at SLURM's queue.

    python -m launch.status                         of the study that was swept last, below studies/
    python -m launch.status study=DIR
    python -m launch.status study=DIR --watch       stays, and looks again every ten seconds
    python -m launch.status study=DIR all=true      every run, however many there are

Runs of an earlier plan of the study are shown for as long as they wait or run.
Exit status: 0; 1 if a run failed or was lost; 2 for a folder that holds no study.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live

from launch.command import parsed
from launch.display import in_words, runs_table
from launch.queue import QueuedJob, read_queue
from launch.state import STATES, RunState, look
from launch.submission import of_other_users, rows_beyond, submissions
from scaling.command import run_main
from scaling.errors import UserError
from scaling.records import Record, StudyDirectory, newest_event

SECONDS_BETWEEN_LOOKS = 10.0
NARROW = 120  # columns of a terminal, below which the table leaves some of its own out
LEFT_OUT = ("audio s/s", "nodes", "last event")
MOST_ROWS = 100  # of a table for people
COLUMNS = ("run", "state", "step", "loss", "audio s/s", "left", "job", "nodes", "last event", "")
GOING = ("queued", "requeued", "starting", "running", "evaluating", "ending")


def main(words: Sequence[str]) -> int:
    given = parsed(words, {"study": "the study's folder", "all": "true for every run"}, flags=("--watch",))
    study = StudyDirectory(Path(given["study"])) if "study" in given else newest_study()
    plan = study.read_plan()
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False)
    others = rows_beyond(study, [row["run_id"] for row in plan])
    rows, states, trouble = study_states(study, plan, others)
    is_narrow = console.width < NARROW
    if "--watch" in given:
        with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
            live.update(Group(status_table(study, rows, states, is_narrow), trouble), refresh=True)
            while any(state.state in GOING for state in states):
                time.sleep(SECONDS_BETWEEN_LOOKS)
                rows, states, trouble = study_states(study, plan, others)
                trouble += " Looking again." if trouble else ""
                live.update(Group(status_table(study, rows, states, is_narrow), trouble), refresh=True)
    else:
        console.print(status_table(study, rows, states, is_narrow, given.get("all") == "true"))
        if trouble:
            print(trouble, file=sys.stderr)
    return 1 if any(state.state in ("failed", "lost") for state in states) else 0


def study_states(
    study: StudyDirectory, plan: Sequence[Record], others: Sequence[Record] = ()
) -> tuple[list[Record], list[RunState], str]:
    """The rows and states of all planned runs, and of those others that wait or run; what they could not be told by.

    SLURM is asked once, and only if the study was submitted to it. Where it does not answer, and of runs that another
    user submitted, the states are what the runs' own records say.
    """
    queue: dict[str, QueuedJob] | None = None
    troubles = []
    try:
        queue = read_queue() if any(submissions(study)) else None
    except UserError as error:
        troubles.append(f"{error} These are the states on record.")
    foreign = of_other_users(study)
    if foreign:
        users = ", ".join(sorted(set(foreign.values())))
        troubles.append(f"Of jobs submitted by {users} these are the states on record.")
    looked = []
    for row in (*plan, *others):
        run = study.run(row["run_id"])
        is_ours = not foreign or newest_event(run.event_lines(), "submitted").get("submission") not in foreign
        seconds = row["audio_hours_seen"] * 3600
        looked.append((row, look(run, row["steps"], seconds, queue if is_ours else None)))
    shown = looked[: len(plan)] + [pair for pair in looked[len(plan) :] if pair[1].state in GOING]
    return [row for row, _ in shown], [state for _, state in shown], " ".join(troubles)


def status_table(
    study: StudyDirectory,
    rows: Sequence[Record],
    states: Sequence[RunState],
    is_narrow: bool = False,
    is_whole: bool = False,
) -> RenderableType:
    """One row a run; of many runs those about which there is something to know, and the counts of all."""
    counts = Counter(state.state for state in states)
    summary = ", ".join(f"{counts[name]} {name}" for name in STATES if counts[name])
    shown = list(zip(states, rows, strict=True))
    if len(shown) > MOST_ROWS and not is_whole:
        telling = [pair for pair in shown if pair[0].state not in ("planned", "queued", "finished")]
        shown = (telling or shown)[:MOST_ROWS]
    columns = [name for name in COLUMNS if not (is_narrow and name in LEFT_OUT)]
    title = f"{study.path}: {len(states)} runs: {summary}"
    table = runs_table([in_words(state, row["steps"]) for state, row in shown], columns, title)
    if len(shown) == len(states):
        return table
    return Group(table, f"{len(states) - len(shown)} more runs are not shown: all=true shows them")


def newest_study() -> StudyDirectory:
    """The study below studies/ whose plan is the newest."""
    plans = sorted(Path("studies").glob("*/plan.jsonl"), key=lambda path: path.stat().st_mtime)
    if not plans:
        raise UserError("no study below studies/ here: name one with study=DIR")
    return StudyDirectory(plans[-1].parent)


if __name__ == "__main__":
    run_main(main, __doc__ or "", interrupted="")
