"""Records survive what crashes do to files."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scaling.records import (
    RecordError,
    RunDirectory,
    StudyDirectory,
    append_record,
    read_appended,
    read_records,
    to_json,
    write_whole,
)


def test_a_torn_last_line_costs_that_line_alone(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    for number in range(3):
        append_record(path, {"number": number})
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        complete = whole[:cut].count(b"}")
        append_record(path, {"number": "after"})
        numbers = [record["number"] for record in read_records(path)]
        assert numbers == [*range(complete), "after"]


def test_a_file_that_is_read_as_it_grows_gives_every_record_once(tmp_path: Path):
    for number in range(3):
        append_record(tmp_path / "whole.jsonl", {"number": number, "text": "ü"})
    whole, found, since = (tmp_path / "whole.jsonl").read_bytes(), [], 0
    for cut in range(len(whole) + 1):  # in the middle of a letter too
        (tmp_path / "growing.jsonl").write_bytes(whole[:cut])
        rows, since = read_appended(tmp_path / "growing.jsonl", since)
        found += rows
    assert found == list(read_records(tmp_path / "whole.jsonl"))


def test_lines_of_many_writers_stay_whole(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: append_record(path, {"number": n, "text": "ü" * 500}), range(400)))
    assert sorted(record["number"] for record in read_records(path)) == list(range(400))


def test_a_number_that_is_not_finite_becomes_null(tmp_path: Path):
    append_record(
        tmp_path / "r.jsonl", {"loss": float("nan"), "terms": {"a": float("inf")}, "list": [1.0, -float("inf")]}
    )
    assert json.loads((tmp_path / "r.jsonl").read_text()) == {"loss": None, "terms": {"a": None}, "list": [1.0, None]}


def test_the_steps_a_killed_run_repeats_count_once(tmp_path: Path):
    directory = RunDirectory(tmp_path / "run")
    for step, loss in ((1, 0.5), (2, 0.4), (3, 0.3), (2, 0.41), (3, 0.31), (4, 0.2)):
        directory.log_metrics("train", step, loss=loss)
    directory.log_metrics("validation", 2, loss=1.0)
    rows = directory.read_metrics()
    assert [(row["kind"], row["step"], row["loss"]) for row in rows] == [
        ("train", 1, 0.5),
        ("train", 2, 0.41),
        ("validation", 2, 1.0),
        ("train", 3, 0.31),
        ("train", 4, 0.2),
    ]


def test_a_runs_state_follows_its_events(tmp_path: Path):
    directory = RunDirectory(tmp_path / "run")
    assert directory.state() == ("planned", {})
    for event, state in (
        ("submitted", "submitted"),
        ("started", "running"),
        ("checkpointed", "running"),
        ("failed", "failed"),
        ("submitted", "submitted"),
        ("resumed", "running"),
        ("preempted", "preempted"),
        ("resumed", "running"),
        ("evaluating", "running"),
        ("finished", "finished"),
        ("submitted", "finished"),  # by a sweep that looked too early
        ("failed", "finished"),
    ):
        directory.log_event(event, note=event)
        assert directory.state()[0] == state
    assert directory.state()[1]["note"] == "finished"
    with pytest.raises(ValueError, match="event 'stopped' is none of"):
        directory.log_event("stopped")


@pytest.mark.parametrize("damaged", ['{"run_id": "b", "steps": 1', "[1, 2]", '{"run_id": "\udcff"}'])
def test_a_damaged_line_of_a_plan_is_named_and_loses_no_run_silently(tmp_path: Path, damaged: str):
    plan = tmp_path / "plan.jsonl"
    plan.write_bytes(f'{{"run_id": "a"}}\n{damaged}\n{{"run_id": "c"}}\n'.encode(errors="surrogateescape"))
    with pytest.raises(RecordError, match=r"plan.jsonl: line 2 is not a JSON object; plan the study again"):
        StudyDirectory(tmp_path).read_plan()
    plan.write_text('{"run_id": "a"}\n\n{"run_id": "c"}\n')
    assert [row["run_id"] for row in StudyDirectory(tmp_path).read_plan()] == ["a", "c"]


def test_text_in_another_encoding_is_written_as_json_escapes_it(tmp_path: Path):
    name = os.fsdecode(b"odd\xed")
    write_whole(tmp_path / "plan.json", to_json({"study": name}))
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8")) == {"study": name}


def test_a_folder_that_is_no_study_or_run_says_so(tmp_path: Path):
    with pytest.raises(
        RecordError, match=r"no study at .*: it has no plan.jsonl; make one with python -m launch.sweep"
    ):
        StudyDirectory(tmp_path).read_plan()
    with pytest.raises(RecordError, match=r"no run at .*: it has no plan.json"):
        RunDirectory(tmp_path).read_plan()
    (tmp_path / "plan.json").write_text('{"run_id":')
    with pytest.raises(RecordError, match=r"plan.json is not JSON"):
        RunDirectory(tmp_path).read_plan()


def test_a_run_that_starts_anew_within_a_job_keeps_what_is_the_jobs(tmp_path: Path):
    run = RunDirectory(tmp_path / "run")
    for event in ("submitted", "launched", "started", "checkpointed", "finished", "ended", "submitted", "launched"):
        run.log_event(event)
    (run.jobs / "1").mkdir(parents=True)
    run.log_metrics("train", 1, loss=0.5)
    run.clear(keep_jobs=True)
    assert [event["event"] for event in run.read_events()] == [
        "submitted",
        "launched",
        "ended",
        "submitted",
        "launched",
    ]
    assert run.state()[0] == "running", "not finished, as the run before it"
    assert (run.jobs / "1").exists()
    assert not run.metrics.exists()
    run.clear()
    assert not list(run.path.iterdir())
