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
from launch.local import run_locally
from launch.planning import plan_study, plan_table, write_plan
from launch.slurm import live_jobs, require_slurm, submit_to_slurm
from scaling.cli import CONFIG_FOLDER, load_config, run_main
from scaling.errors import UserError
from scaling.plan import RunPlan
from scaling.records import StudyDirectory


def main(words: list[str]) -> int:
    words = [_spelt_for_hydra(word) for word in words]
    if not any(word.startswith("+sweep=") for word in words):
        sweeps = sorted(path.stem for path in (CONFIG_FOLDER / "sweep").glob("*.yaml"))
        raise UserError(f"no sweep named: give +sweep=NAME, one of {', '.join(sweeps)} (the files of conf/sweep)")
    config = load_config(StudyConfig, "study", words)
    study = StudyDirectory(Path(config.study))
    plans = plan_study(config, words)
    Console(width=None if sys.stdout.isatty() else 160).print(
        plan_table(plans, {plan.run_id: plan.directory.state()[0] for plan in plans})
    )
    if config.dry_run:
        return 0
    if config.cluster.executor == "slurm":
        require_slurm()
    write_plan(study, plans)
    todo = [plan for plan in plans if not is_settled(plan)]
    print(f"{len(plans) - len(todo)} of {len(plans)} runs are settled, {len(todo)} to execute")
    if todo and config.cluster.executor == "slurm":
        return _submit(study, todo, config)
    if todo:
        signal.signal(signal.SIGTERM, _interrupt)
        with RunsDisplay(todo) as display:
            run_locally(todo, config.cluster, display.show)
    _report(study)
    return _tell_failures(plans)


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


def _last_job(plan: RunPlan) -> str | None:
    jobs = [event.get("job") for event in plan.directory.read_events() if event.get("event") == "submitted"]
    return jobs[-1] if jobs else None


def _report(study: StudyDirectory) -> None:
    """In a process of its own: the analysis imports nothing of this room, nor this room of it."""
    sys.stdout.flush()
    subprocess.run([sys.executable, "-m", "analysis.report", f"study={study.path}"], check=False)


def _tell_failures(plans: Sequence[RunPlan]) -> int:
    failed = 0
    for plan in plans:
        state, event = plan.directory.state()
        if state != "finished":
            failed += 1
            logs = [e["log"] for e in plan.directory.read_events() if e.get("event") == "submitted" and e.get("log")]
            reason = f"{event.get('failure')}: {event.get('reason')}" if state == "failed" else f"it is {state}"
            print(f"run {plan.run_id} did not finish, {reason}; log: {logs[-1] if logs else 'none'}", file=sys.stderr)
    return 1 if failed else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_main(main, __doc__ or "")
