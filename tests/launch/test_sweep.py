"""A sweep executes each cell once, survives what happens to it, and says how every cell ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch import sweep
from scaling.cli import CONFIG_FOLDER
from scaling.plan import RunPlan
from scaling.records import RunDirectory, StudyDirectory, to_json

AXES = ("sweep.axes.model=[xxt,xt]", "sweep.axes.seed=[0,1]")


@pytest.fixture
def sweep_words(tiny_run: list[str]) -> list[str]:
    return [
        "+sweep=sizes",
        *(w for w in tiny_run if not w.startswith(("model=", "seed="))),
        *AXES,
    ]


def started(study: StudyDirectory) -> dict[str, int]:
    """How often each run was started or resumed."""
    return {
        path.name: sum(event["event"] in ("started", "resumed") for event in RunDirectory(path).read_events())
        for path in study.runs.iterdir()
    }


def test_a_sweep_trains_every_cell_once_and_ends_with_a_report(sweep_words: list[str], tmp_path: Path, command):
    study = StudyDirectory(tmp_path / "study")
    sweep_words.remove("execution.threads=1")

    dry = command("launch.sweep", *sweep_words, "dry_run=true")
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.count("planned") == 4
    assert "338 K" in dry.stdout
    assert not study.path.exists(), "a dry run leaves nothing behind"

    done = command("launch.sweep", *sweep_words)
    assert done.returncode == 0, done.stderr
    plan = study.read_plan()
    assert len(plan) == 4
    assert [row["size"]["name"] for row in plan] == ["xt", "xt", "xxt", "xxt"], "longest first"
    assert started(study) == {row["run_id"]: 1 for row in plan}
    for row in plan:
        directory = study.run(row["run_id"])
        assert directory.state()[0] == "finished"
        (event,) = [event for event in directory.read_events() if event["event"] in ("started", "resumed")]
        assert event["hardware"]["threads"] == max(1, len(os.sched_getaffinity(0)) // 4)
        assert len(directory.read_scores()) == 4
    seeds = {row["seed"]: study.run(row["run_id"]).read_metrics()[0]["loss"] for row in plan}
    assert len(set(seeds.values())) == 2
    report = study.report
    for name in ("scaling_table.md", "scaling_table.csv", "scaling_table.tex", "scaling.png", "report.md"):
        assert (report / name).stat().st_size > 100, name
    assert "xxt" in done.stdout

    of_another_version = study.run(plan[0]["run_id"]).plan
    of_another_version.write_text(to_json(json.loads(of_another_version.read_text()) | {"config": None}))
    begun = time.monotonic()
    again = command("launch.sweep", *sweep_words, "execution.log_every=2")
    assert again.returncode == 0, again.stderr
    assert "4 of 4 runs are complete (finished or diverged), 0 to run" in again.stdout
    assert "of 3 complete runs execution.log_every = 1 and not 2: they stay so" in again.stdout
    assert started(study) == {row["run_id"]: 1 for row in plan}
    assert time.monotonic() - begun < 60


def test_a_failing_cell_leaves_the_others_and_is_named_with_its_log(sweep_words: list[str], tmp_path: Path, command):
    words = [word for word in sweep_words if not word.startswith("sweep.axes")]
    done = command(
        "launch.sweep", *words, "sweep.axes.model=[xxt]", "sweep.axes.train.optimiser.learning_rate=[0.001,1e30]"
    )
    assert done.returncode == 1
    study = StudyDirectory(tmp_path / "study")
    states = sorted(study.run(row["run_id"]).state()[0] for row in study.read_plan())
    assert states == ["failed", "finished"]
    (line,) = [line for line in done.stderr.splitlines() if "did not finish" in line]
    assert "diverged: the loss of step" in line
    log = Path(line.rsplit("log: ", 1)[1])
    assert "diverged" in log.read_text()
    assert "diverged" in (study.report / "report.md").read_text()

    again = command(
        "launch.sweep", *words, "sweep.axes.model=[xxt]", "sweep.axes.train.optimiser.learning_rate=[0.001,1e30]"
    )
    assert again.returncode == 1, "a diverged run is a result: not tried again, still told"
    assert "they stay so" not in again.stdout
    assert "2 of 2 runs are complete (finished or diverged), 0 to run" in again.stdout


def test_a_cell_whose_process_is_killed_is_told_and_goes_on_at_the_next_call(
    sweep_words: list[str], tmp_path: Path, command
):
    words = [*sweep_words, "sweep.axes.model=[xxt]", "sweep.axes.seed=[0,1]", "train.budget.steps=60"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.sweep", *words], cwd=tmp_path, stdout=-3, stderr=subprocess.PIPE, text=True
    )
    study = StudyDirectory(tmp_path / "study")
    victim = wait_for_running(study, process)
    os.kill(int(victim.lock.read_text()), signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "node failure: its process ended without recording a reason" in errors
    states = {row["run_id"]: study.run(row["run_id"]).state()[0] for row in study.read_plan()}
    assert sorted(states.values()) == ["failed", "finished"]
    assert states[victim.run_id] == "failed"

    again = command("launch.sweep", *words)
    assert again.returncode == 0, again.stderr
    assert "1 of 2 runs are complete (finished or diverged), 1 to run" in again.stdout
    assert victim.state()[0] == "finished"
    assert started(study)[victim.run_id] == 2
    assert [row["step"] for row in victim.read_metrics() if row["kind"] == "train"] == list(range(1, 61))


def test_a_killed_sweeps_runs_are_found_by_the_next_call_and_not_doubled(
    sweep_words: list[str], tmp_path: Path, command
):
    words = [*sweep_words, "sweep.axes.model=[xxt]", "sweep.axes.seed=[0,1,2]", "train.budget.steps=60"]
    process = subprocess.Popen([sys.executable, "-m", "launch.sweep", *words], cwd=tmp_path, stdout=-3, stderr=-3)
    study = StudyDirectory(tmp_path / "study")
    wait_for_running(study, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = command("launch.sweep", *words)
    assert again.returncode == 0, again.stderr
    assert set(started(study).values()) == {1}, "a run that went on alone was started again"
    assert len(started(study)) == 3


def test_a_second_sweep_on_the_same_study_is_refused_by_name(sweep_words: list[str], tmp_path: Path, command):
    words = [*sweep_words, "sweep.axes.model=[xxt]", "sweep.axes.seed=[0]", "train.budget.steps=60"]
    process = subprocess.Popen([sys.executable, "-m", "launch.sweep", *words], cwd=tmp_path, stdout=-3, stderr=-3)
    study = StudyDirectory(tmp_path / "study")
    wait_for_running(study, process)
    second = command("launch.sweep", *words)
    assert second.returncode == 2
    assert f"is being swept by process {process.pid}: wait for it, or stop it first" in second.stderr
    assert process.wait(timeout=300) == 0
    assert set(started(study).values()) == {1}


def test_a_budget_can_be_an_axis_and_quick_checks_stay_out_of_the_study(
    sweep_words: list[str], tmp_path: Path, command
):
    words = [*sweep_words, "sweep.axes.model=[xxt]", "sweep.axes.seed=[0]", "train.budget.steps=null", "dry_run=true"]
    done = command("launch.sweep", *words, "sweep.axes.train.budget.epochs=[2,4]")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("planned") == 2
    quick = command("launch.sweep", *sweep_words, "sweep.axes.model=[xxt]", "sweep.axes.seed=[0]", "train.test=true")
    assert quick.returncode == 0, quick.stderr
    assert not (tmp_path / "study").exists()
    study = StudyDirectory(tmp_path / "study-test")
    assert study.read_plan()[0]["steps"] == 10
    (run,) = [study.run(run_id) for run_id in study.read_run_ids()]
    assert run.read_events()[0]["event"] == "submitted"
    logs = command("launch.logs", run.run_id, f"study={study.path}")
    assert "test set: " in logs.stdout, "a quick check starts anew every time, and leaves its job's files alone"


def test_a_quick_check_of_a_sweep_starts_anew_every_time_and_complete_runs_do_not(
    sweep_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run_locally(todo: list[RunPlan], *_: object) -> None:
        executed.append(len(todo))
        for plan in todo:
            plan.write().log_event("finished")

    executed: list[int] = []
    monkeypatch.setattr(sweep, "run_locally", run_locally)
    monkeypatch.setattr(sweep, "_report", lambda study: True)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for words in ([*sweep_words, "train.test=true"], sweep_words):
        assert [sweep.main(words), sweep.main(words)] == [0, 0]
    assert executed == [4, 4, 4]


@pytest.mark.parametrize(("how", "num_processes"), [("interrupt", 1), ("cancel", 2), ("cancel a run", 1)])
def test_a_run_that_is_stopped_saves_first_and_the_next_call_goes_on(
    sweep_words: list[str], tmp_path: Path, command, how: str, num_processes: int
):
    steps = 100 if how == "interrupt" else 500  # the command takes a while to say it
    words = [*sweep_words, "sweep.axes.model=[xxt]", "sweep.axes.seed=[0]", f"train.budget.steps={steps}"]
    words += ["execution.checkpoint_every=1000", f"cluster.processes_per_node={num_processes}"]
    process = start_sweep(words, tmp_path)
    study = StudyDirectory(tmp_path / "study")
    victim = wait_for_running(study, process)
    family = psutil.Process(process.pid).children(recursive=True)
    if how == "interrupt":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the runs as well
    else:
        names = [victim.run_id] if how == "cancel a run" else []
        assert command("launch.cancel", *names, f"study={study.path}").stdout.startswith("told 1 run to stop;")
    _, errors = process.communicate(timeout=180)
    if how == "cancel a run":
        assert process.returncode == 1
        assert f"run {victim.run_id} did not finish, it is preempted" in errors
    else:
        assert process.returncode == 130
        assert "told 1 run to save and stop" in errors
        assert "run the same command again to go on" in errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    state, event = victim.state()
    assert (state, event["reason"]) == ("preempted", "SIGTERM")
    saved = [event["step"] for event in victim.read_events() if event["event"] == "checkpointed"]
    assert saved == [victim.read_metrics()[-1]["step"]]
    if how == "interrupt":
        again = command("launch.sweep", *words)
        assert again.returncode == 0, again.stderr
        assert victim.state()[0] == "finished"
        assert [row["step"] for row in victim.read_metrics() if row["kind"] == "train"] == list(range(1, steps + 1))


def test_a_second_interrupt_ends_runs_that_do_not_save(sweep_words: list[str], tmp_path: Path):
    words = [*sweep_words, "sweep.axes.model=[xxt]", "sweep.axes.seed=[0]", "train.budget.steps=500"]
    process = start_sweep(words, tmp_path)
    victim = wait_for_running(StudyDirectory(tmp_path / "study"), process)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(int(victim.lock.read_text()), signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert any("told 1 run to save and stop" in line for line in process.stderr)
    assert process.poll() is None
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert time.monotonic() - begun < 60, "half of the time that a run has to save"


def test_mistakes_in_a_sweep_are_one_line(sweep_words: list[str], tmp_path: Path, command):
    sweeps = ", ".join(sorted(path.stem for path in (CONFIG_FOLDER / "sweep").glob("*.yaml")))
    for words, expected in (
        ([], f"error: no sweep named: give +sweep=NAME, one of {sweeps} (the files of conf/sweep)"),
        (["+sweep=size"], f"error: sweep=size: no such sweep; expected one of {sweeps} (the files of conf/sweep)"),
        ([*sweep_words, "model=xt"], "error: model=xt: model is an axis of sweep sizes: set sweep.axes.model=[xt]"),
        (
            [*sweep_words, "model=[xxt,t]"],
            "error: model=[xxt,t]: model is an axis of sweep sizes: set sweep.axes.model=[xxt,t] instead",
        ),
        ([*sweep_words, "sweep.axes.model=[xxt,huge]"], "error: model=huge: no such model"),
        ([*sweep_words, "sweep.axes.execution.num_workers=[1,2]"], "error: sweep sizes: cells {'model': 'xxt', 'seed'"),
        ([*sweep_words, "sweep.axes.train.sede=[1,2]"], "error: train.sede: no such setting"),
        (
            [*sweep_words, "sweep.axes.model=[xxt]", "sweep.axes.model.norm=[batch]"],
            "error: sweep.axes.model: an axis and one of its own settings cannot both be axes; write "
            "'sweep.axes={model: [...], model.norm: [batch]}'",
        ),
        (  # beside the axis of the sweep's file
            ["+sweep=sizes", "sweep.axes.model.num_channels=[8,16]"],
            "error: sweep.axes.model: an axis and one of its own settings cannot both be axes; write "
            "'sweep.axes={model: [...], model.num_channels: [8,16]}'",
        ),
        ([*sweep_words, "sweep.axis=3"], "error: axis: no such setting; did you mean axes?"),
        (
            [*sweep_words, "model.num_layers=3"],
            "error: model.num_layers=3: would give every size of sweep sizes the same model.num_layers: make a size of "
            "its own in conf/model, or, for it at sizes of your choice, write 'sweep.axes={model: [...], "
            "model.num_layers: [3]}'",
        ),
        ([*sweep_words, "sweep.points=[3]"], "error: sweep.points has 3: expected axis: value pairs"),
        ([*sweep_words, "study=/dev/null/x"], "error: /dev/null/x cannot be written"),
        ([*sweep_words, "cluster.max_parallel=0"], "error: cluster.max_parallel = 0: expected at least 1"),
    ):
        done = command("launch.sweep", *words)
        assert done.returncode == 2, done.stdout + done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert line.startswith(expected)
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "study").exists()


def test_slurm_where_there_is_none_is_one_line(sweep_words: list[str], tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "launch.sweep", *sweep_words, "cluster=slurm"],
        cwd=tmp_path,
        env=os.environ | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: cluster=slurm: sbatch and squeue are not on the PATH")
    assert not (tmp_path / "study").exists()


def test_runs_that_differ_in_any_other_axis_can_be_told_apart_before_they_start(tiny_data: list[str], command):
    axes = "sweep.axes={model: [xxt], train.optimiser.learning_rate: [0.001, 0.003], seed: [0]}"
    done = command("launch.sweep", "+sweep=sizes", *tiny_data, axes, "dry_run=true")
    assert done.returncode == 0, done.stderr
    heading, *rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("run ", "xxt"))]
    column = heading.index("learning_rate")
    assert [row[column] for row in rows] == ["0.001", "0.003"]


@pytest.mark.parametrize("name", ["sizes", "budgets", "grid", "isoflop"])
def test_every_sweep_of_the_configuration_plans_on_its_defaults(
    name: str, tiny_data: list[str], tmp_path: Path, command
):
    hours = ["sweep.axes.data.hours=[0.01,0.02]"] if name in ("budgets", "grid") else []
    done = command("launch.sweep", f"+sweep={name}", *tiny_data, *hours, "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "of training in all, on one core or GPU" in done.stdout
    if name == "isoflop":  # what equal compute does at the ends of the range is seen before anything is spent
        told = " ".join(done.stdout.split())
        mostly = "fewer steps than 3 warm-ups, so mostly warm-up, in 2 of 14 runs: c24 (31 steps), xt (34 steps)"
        assert mostly in told
        tiny = ("sweep.axes.model=[c8]", "sweep.axes.train.budget.train_pmacs=[0.002,0.05]")
        told = command("launch.sweep", f"+sweep={name}", *tiny_data, *tiny, "dry_run=true").stdout
        assert "more than 500 passes over the data in 1 of 2 runs: c8 (32,864 steps)" in " ".join(told.split())


def test_a_cell_that_is_all_warm_up_is_shown_by_name_and_nothing_starts_before_it_is_dropped(
    tiny_data: list[str], tmp_path: Path, command
):
    words = ["+sweep=isoflop", *tiny_data, "sweep.axes.model=[xt,c48]", "sweep.axes.train.budget.train_pmacs=[0.0005]"]
    shown = command("launch.sweep", *words, "dry_run=true")
    assert shown.returncode == 0, shown.stderr
    states = {line.split()[1]: line.rstrip() for line in shown.stdout.splitlines() if "-seed0-" in line.split(" ")[0]}
    assert states["c48"].endswith("cannot start")
    assert states["xt"].endswith("planned")
    refused = command("launch.sweep", *words, f"study={tmp_path / 'study'}")
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith("error: the warm-up is as long as the whole run of c48-seed0-")
    assert "(10 steps, warm-up of 20): lower train.optimiser.warmup_steps, raise train.budget, or add" in line
    assert not (tmp_path / "study").exists()
    rule = line.partition(" or add ")[2].removesuffix(" to sweep.exclude")
    kept = command("launch.sweep", *words, f"sweep.exclude=[{rule},{{model: c49, seed: 0}}]", "dry_run=true")
    assert kept.stdout.startswith("1 run ")
    (told,) = [line for line in kept.stderr.splitlines() if "sweep.exclude" in line]
    assert told.endswith("WARNING sweep.exclude: {model: c49, seed: 0} drops no cell: no cell has these values")
    assert "cannot start" not in kept.stdout


def start_sweep(words: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.sweep", *words],
        cwd=folder,
        stdout=-3,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_running(study: StudyDirectory, process: subprocess.Popen) -> RunDirectory:
    """The first run that has trained a few steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the sweep ended too early"
        for path in study.runs.glob("*"):
            if len(RunDirectory(path).read_metrics()) >= 7:
                return RunDirectory(path)
        time.sleep(0.02)
    raise AssertionError("no run started")


def test_speed_against_processes_is_a_sweep_whose_runs_differ_in_nothing_else(
    tiny_run: list[str], tmp_path: Path, command
):
    words = ["+sweep=processes", *(word for word in tiny_run if not word.startswith(("model=", "execution.threads=")))]
    words = [word for word in words if not word.startswith("train.global_batch")]
    words.append("sweep.axes.train.global_batch=[4]")
    # The losses of compressed spectra are so steep where a bin is near 0 that within ten steps roundings grow to 1e-3.
    words += [f"train.losses.{term}=0" for term in ("magnitude", "complex", "consistency")]
    done = command("launch.sweep", *words)
    assert done.returncode == 0, done.stderr
    study = StudyDirectory(tmp_path / "study")
    plan = study.read_plan()
    assert {row["run_id"].rpartition("-")[0] for row in plan} == {
        "xxt-seed0-processes_per_node1",
        "xxt-seed0-processes_per_node2",
    }
    assert plan[0]["science"] == plan[1]["science"]
    losses = {}
    for row in plan:
        size = row["axes"]["cluster.processes_per_node"]
        directory = study.run(row["run_id"])
        assert directory.state()[0] == "finished"
        started = directory.read_events()[1]
        assert (started["event"], started["world_size"], started["nodes"]) == ("started", size, 1)
        rows = directory.read_metrics()
        losses[size] = [metrics["loss"] for metrics in rows]
        last = [metrics for metrics in rows if metrics["kind"] == "train"][-1]
        assert ("communication_seconds" in last) == (size == 2)
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    # The run of one process alone is executed again as it was beside that of two, with as many threads.
    (alone,) = [study.run(row["run_id"]) for row in plan if row["axes"]["cluster.processes_per_node"] == 1]
    alone.clear()
    done = command("launch.sweep", *words)
    assert "1 of 2 runs are complete (finished or diverged), 1 to run" in done.stdout, done.stderr
    assert alone.read_events()[1]["hardware"]["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
    assert [metrics["loss"] for metrics in alone.read_metrics()] == losses[1]
    table = (study.report / "tables" / "node_scaling.md").read_text()
    assert table.count("| xxt | strong |") == 2


def test_cells_that_differ_in_execution_alone_are_the_same_run(sweep_words: list[str], command):
    words = [word for word in sweep_words if not word.startswith("sweep.axes")]
    refused = command("launch.sweep", *words, "sweep.axes.model=[xxt]", "sweep.axes.execution.num_workers=[0,1]")
    assert refused.returncode == 2
    assert "their axes differ in no scientific setting; remove one, or" in refused.stderr
