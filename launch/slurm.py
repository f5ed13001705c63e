"""What is asked of SLURM and how: the script of a job, the shape it has, SLURM's own commands."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launch.config import ClusterConfig
from launch.queue import ask, environment, said
from launch.submission import Settings, Submission
from scaling.errors import UserError
from scaling.records import Record, StudyDirectory

SUBMIT_LIMIT = r"SubmitJob\w*Limit|MaxSubmitJobsPerAccount"  # as AssocMaxSubmitJobLimit, QOSGrpSubmitJobsLimit
OURS = ("signal", "open-mode")  # options that are not a site's matter

# What the shell of a job does around the processes of its run. It outlives the signals that
# tell those to stop, in order to say what became of them.
# --kill-on-bad-exit=0: ranks end by themselves when one is lost (scaling.liveness), and say which. Where srun ends
# them and they take longer than SLURM's MessageTimeout (10 s), slurmctld repeats its order about a minute later, and
# it meets the step of the same number in the requeued job: seen on 22.05, a SIGTERM in each attempt that followed.
# --wait=0: rank 0 scores the test set when the others have gone, for longer than a site's WaitTime may be.
# --export=ALL: else the processes have what sbatch was told to hand on, which a site may want to be NONE.
HEAD = """\
#!/bin/bash
{options}

{lines}
export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}
attempt=${{SLURM_RESTART_COUNT:-0}}
trap : TERM USR1 USR2
LAUNCH_NODE_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if ! getent hosts "$LAUNCH_NODE_ADDRESS" > /dev/null; then  # then by the address that SLURM itself reaches it at
    LAUNCH_NODE_ADDRESS=$(scontrol show node "$LAUNCH_NODE_ADDRESS" --oneliner | grep -oP 'NodeAddr=\\K\\S+')
fi
export LAUNCH_NODE_ADDRESS
"""
PROCESSES = """\
eval "$where"
srun --kill-on-bad-exit=0 --wait=0 --unbuffered --export=ALL --cpus-per-task={cpus} \\
    --output={logs}/$SLURM_ARRAY_TASK_ID.$attempt.%t.log {srun_args} \\
    {python} -u -m {module} {folder} &
processes=$!
wait $processes
while kill -0 $processes 2> /dev/null; do wait $processes; done
wait $processes
status=$?
"""
BEGIN = """\
where=$(sinfo --Node --noheader --states=down,fail,drain,no_respond --format='%N %T' | sort -u \\
    | {python} -m launch.attempt begin {folder}) || exit 1
[ -n "$where" ] || exit 0
"""
# Of the element that starts last SLURM_JOB_ID is the array's own id, by which scontrol takes all of them.
END = """\
element="${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
treatment=$(scontrol show job --oneliner "$element" | {python} -m launch.attempt end {folder} $status)
[ "$treatment" = requeue ] || exit $status
for pause in 0 2 5 10 20; do  # all of an array may meet their time limit at once
    sleep $pause
    said=$(scontrol requeue "$element" 2>&1) && exit 0
done
{python} -m launch.attempt refused {folder} <<< "$said"
exit $status
"""
MEET = """\
where=$({python} -m launch.attempt meet {folder}) || exit 1
"""
TELL = """\
echo $status > {folder}/status
exit $status
"""


class BeyondLimitError(UserError):
    """More jobs than a site lets a user, an account or a QOS have in its queue."""


def batch_script(shape: ClusterConfig, options: Mapping[str, str], code: Path, folder: Path) -> str:
    """The script of an array of runs; `options` for sbatch beside what the shape asks for."""
    return _filled(HEAD + BEGIN + PROCESSES + END, "launch.rank", shape, options, code, folder)


def preflight_script(shape: ClusterConfig, code: Path, submission: Submission) -> str:
    """The script of a job that checks a shape, and does not come back when it fails."""
    log = f"{in_a_pattern(submission.path)}/0.log"
    options = {"array": "0-0", "output": log, "job-name": "preflight", "no-requeue": ""}
    return _filled(HEAD + MEET + PROCESSES + TELL, "launch.preflight_rank", shape, options, code, submission.path)


def in_a_pattern(folder: Path) -> str:
    """A folder as part of the name of a log, in which SLURM replaces %a by the element, %t by the rank and so on."""
    return str(folder).replace("%", "%%")


def _filled(
    script: str, module: str, shape: ClusterConfig, options: Mapping[str, str], code: Path, folder: Path
) -> str:
    asked = {**_resources(shape), **options, **shape.additional_parameters}
    lines = [f"module load {name}" for name in shape.modules] + shape.setup
    python = f"{shape.container} " if shape.container else ""
    python += f"{shape.python or shlex.quote(sys.executable)} -P"
    said = [f"{name}={shlex.quote(value)}" if value else name for name, value in asked.items()]
    return script.format(
        options="\n".join(f"#SBATCH --{option}" for option in said),
        lines="\n".join(lines),
        code=shlex.quote(str(code)),
        folder=shlex.quote(str(folder)),
        logs=shlex.quote(in_a_pattern(folder)),
        python=python,
        module=module,
        cpus=shape.cpus_per_task,
        srun_args=shlex.join(shape.srun_args),
    )


def require_slurm() -> None:
    """UserError where SLURM's commands are not at hand."""
    if shutil.which("sbatch") is None or shutil.which("squeue") is None:
        raise UserError(
            "cluster=slurm: sbatch and squeue are not on the PATH: "
            "run this on a login node of the cluster, or take cluster=local"
        )


def shape_record(shape: ClusterConfig) -> Record:
    """What decides how fast a run goes, as measured speeds are filed by."""
    names = ("nodes", "gpus_per_node", "cpus_per_task", "partition", "constraint", "signal_seconds")
    return {name: getattr(shape, name) for name in names} | {"tasks_per_node": shape.tasks_per_node}


def settings_of(shape: ClusterConfig) -> Settings:
    return Settings(
        num_processes=shape.num_processes,
        devices=shape.num_devices,
        shape=shape_record(shape),
        threads=shape.cpus_per_task,
        throughput=str(Path(shape.throughput).resolve()),
        max_fruitless_attempts=shape.max_fruitless_attempts,
    )


def _resources(shape: ClusterConfig) -> dict[str, str]:
    asked = {
        "nodes": shape.nodes,
        "ntasks-per-node": shape.tasks_per_node,
        "cpus-per-task": shape.cpus_per_task,
        "gpus-per-node": shape.gpus_per_node or None,
        "mem": f"{round(shape.mem_gb * 1024)}M" if shape.mem_gb else None,
        "time": shape.timeout_min,
        "partition": shape.partition,
        "account": shape.account,
        "qos": shape.qos,
        "constraint": shape.constraint,
        "signal": f"USR1@{shape.signal_seconds}",
        "open-mode": "append",
    }
    return {name: str(value) for name, value in asked.items() if value is not None}


def _refuse_beyond_limits(shape: ClusterConfig) -> None:
    """UserError for what sbatch takes and the partition never runs: most sites don't enforce limits at submission."""
    for line in ask(["scontrol", "show", "partition", "--oneliner"]).splitlines():
        limits = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if shape.partition not in (None, limits.get("PartitionName")):
            continue
        if shape.partition is None and limits.get("Default") != "YES":
            continue
        time_limit, most_nodes = _minutes(limits.get("MaxTime", "")), limits.get("MaxNodes", "")
        if time_limit is not None and shape.timeout_min > time_limit:
            raise UserError(
                f"cluster.timeout_min = {shape.timeout_min} is beyond partition {limits['PartitionName']}'s limit of "
                f"{time_limit} minutes: the job would never start; lower it or take another partition"
            )
        if most_nodes.isdigit() and shape.nodes > int(most_nodes):
            raise UserError(
                f"cluster.nodes = {shape.nodes} is beyond partition {limits['PartitionName']}'s limit of {most_nodes}: "
                "the job would never start; lower it or take another partition"
            )


def _minutes(limit: str) -> int | None:
    """SLURM's days-hours:minutes:seconds in minutes; None where there is no limit."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    return (int(found[1] or 0) * 24 + int(found[2])) * 60 + int(found[3]) if found else None


def try_shape(study: StudyDirectory, shape: ClusterConfig, code: Path) -> None:
    """UserError in one line if SLURM would not take, or never run, a job of this shape."""
    if ":" in str(code):
        raise UserError(
            f"study={study.path}: its jobs import the copy of the code in {code}, and a path with ':' is two paths to "
            "Python: give the study another name or folder"
        )
    _refuse_beyond_limits(shape)
    script = batch_script(shape, {"array": "0-0", "output": "/dev/null"}, code, study.path)
    done = subprocess.run(
        ["sbatch", "--test-only"], input=script, env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode and not re.search(SUBMIT_LIMIT, done.stderr):  # whoever is at that limit may try nothing
        asked = ", ".join(f"{name}={value}" for name, value in _resources(shape).items() if name not in OURS)
        raise UserError(f"SLURM refuses a job with {asked}: {said(done.stderr)}: check cluster's settings")


def sbatch(script: Path, lock: int | None = None) -> str:
    """Submit a script: the array's id; UserError if SLURM refuses it."""
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)],
        stdin=subprocess.DEVNULL,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        pass_fds=() if lock is None else (lock,),
        start_new_session=True,  # an interrupt from the terminal reaches this process, not a submission under way
    )
    if done.returncode:
        if re.search(SUBMIT_LIMIT, done.stderr):
            raise BeyondLimitError(
                f"SLURM takes no more jobs ({said(done.stderr)}): run the same command again when some have ended"
            )
        raise UserError(f"sbatch refused {script} ({said(done.stderr)})")
    return done.stdout.strip().split(";")[0]
