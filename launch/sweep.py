"""A scaling study from one command.

    python -m launch.sweep +sweep=sizes                         sizes on the demo corpus, on this machine
    python -m launch.sweep +sweep=sizes dry_run=true            print the table of runs and stop
    python -m launch.sweep +sweep=grid data=vbd train=fastenhancer cluster=slurm

Composes the cells of conf/sweep/NAME.yaml, plans and prints them, executes those that are not
finished, and on this machine waits for them and writes the report. The same command again
executes nothing that is finished and goes on with what was cut off. A failed run is tried
again; one that diverged is a result and is not.

Exit status: 0 all runs finished (or were submitted), 1 a run failed, 2 a mistake in the input.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from launch.config import StudyConfig
from launch.display import RunsDisplay
from launch.local import last_log, run_locally
from launch.planning import load_study, plan_study, plan_table, write_plan
from launch.slurm import live_jobs, require_slurm, submit_to_slurm
from scaling.cli import CONFIG_FOLDER, run_main
from scaling.errors import UserError
from scaling.plan import RunPlan, require_writable
from scaling.records import StudyDirectory
from scaling.run import held_lock


def main(words: list[str]) -> int:
    words = [_spelt_for_hydra(word) for word in words]
    if not any(word.startswith("+sweep=") for word in words):
        sweeps = sorted(path.stem for path in (CONFIG_FOLDER / "sweep").glob("*.yaml"))
        raise UserError(f"no sweep named: give +sweep=NAME, one of {', '.join(sweeps)} (the files of conf/sweep)")
    config = load_study(words)
    study = StudyDirectory(Path(config.study))
    plans = plan_study(config, words)
    Console(width=None if sys.stdout.isatty() else 160).print(
        plan_table(plans, {plan.run_id: plan.directory.state()[0] for plan in plans})
    )
    if config.dry_run:
        return 0
    if config.cluster.executor == "slurm":
        require_slurm()
    require_writable(study.path)
    with held_lock(study.lock, f"study {study.path} is being swept"):
        return _execute(study, plans, config)


def _execute(study: StudyDirectory, plans: Sequence[RunPlan], config: StudyConfig) -> int:
    """Write the plan, bring what is not settled to its end (or submit it), report."""
    _tell_other_runs(study, plans)
    write_plan(study, plans)
    todo = [plan for plan in plans if not is_settled(plan)]
    print(f"{len(plans) - len(todo)} of {len(plans)} runs are settled, {len(todo)} to execute")
    if todo and config.cluster.executor == "slurm":
        return _submit(study, todo, config)
    if todo:
        signal.signal(signal.SIGTERM, _interrupt)
        with RunsDisplay(todo) as display:
            run_locally(todo, len(plans), config.cluster, display.show)
    is_reported = _report(study)
    return max(_tell_failures(plans), 0 if is_reported else 1)


def _spelt_for_hydra(word: str) -> str:
    """Hydra wants a plus before what the configuration does not name yet; a new axis should not need one."""
    return f"+{word}" if word.startswith("sweep=") else f"++{word}" if word.startswith("sweep.") else word


def is_settled(plan: RunPlan) -> bool:
    """Whether executing the run again would change nothing: it finished, or diverged."""
    state, event = plan.directory.state()
    return state == "finished" or (state == "failed" and event.get("failure") == "diverged")


def _submit(study: StudyDirectory, todo: Sequence[RunPlan], config: StudyConfig) -> int:
    live = live_jobs()
    waiting = [plan for plan in todo if _last_job(plan) in live]
    missing = [plan for plan in todo if plan not in waiting]
    if missing:
        jobs = submit_to_slurm(study, missing, config.cluster)
        print(f"submitted {len(missing)} runs as jobs {jobs[0]} to {jobs[-1]}")
    if waiting:
        print(f"{len(waiting)} runs wait or run already")
    print("to see them: squeue --me")
    print("the same sweep command again submits what was lost, nothing twice, and when all is done makes the report")
    return 0


def _tell_other_runs(study: StudyDirectory, plans: Sequence[RunPlan]) -> None:
    others = {path.name for path in study.runs.glob("*")} - {plan.run_id for plan in plans}
    if others:
        print(
            f"{study.path} holds {len(others)} runs of earlier plans that this sweep does not name: they stay, but its "
            "table is of this plan alone; widen the axes to have both, or give another study=DIR"
        )


def _last_job(plan: RunPlan) -> str | None:
    jobs = [event.get("job") for event in plan.directory.read_events() if event.get("event") == "submitted"]
    return jobs[-1] if jobs else None


def _report(study: StudyDirectory) -> bool:
    """In a process of its own: the analysis imports nothing of this room, nor this room of it."""
    sys.stdout.flush()
    done = subprocess.run([sys.executable, "-m", "analysis.report", f"study={study.path}"], check=False)
    return done.returncode == 0


def _tell_failures(plans: Sequence[RunPlan]) -> int:
    failed = 0
    for plan in plans:
        state, event = plan.directory.state()
        if state != "finished":
            failed += 1
            reason = f"{event.get('failure')}: {event.get('reason')}" if state == "failed" else f"it is {state}"
            print(f"run {plan.run_id} did not finish, {reason}; log: {last_log(plan)}", file=sys.stderr)
    return 1 if failed else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_main(main, __doc__ or "")
