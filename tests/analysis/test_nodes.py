"""Speedup, efficiency and hours of compute are sums over processes and sessions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis.gather import gather
from analysis.nodes import node_table
from scaling.records import StudyDirectory
from tests.analysis.generated import lines, run_record, write_run


def test_speedup_and_efficiency_over_processes_strong_and_weak(tmp_path: Path):
    study, rng, plans = StudyDirectory(tmp_path / "study"), np.random.default_rng(0), []
    for weak in (False, True):
        for processes, speed in ((1, 10.0), (2, 19.0), (4, 32.0)):
            plan = run_record("t", 1.0 + weak, processes=processes, axes={"cluster.nodes": processes})
            plan["global_batch"] = 64 * (processes if weak else 1) * (1 + weak)
            write_run(study, plan, 0.04, rng)
            run = study.run(plan["run_id"])
            events = run.read_events()
            events[1] |= {"world_size": processes}
            run.events.write_text(lines(events))
            rows = run.read_metrics()
            for row in rows:
                row |= {
                    "audio_seconds_per_second": speed,
                    "step_seconds": 1.0,
                    "communication_seconds": 0.05 * processes,
                }
            run.metrics.write_text(lines(rows))
            plans.append(plan)
    study.plan.write_text(lines(plans))
    table = node_table(gather(study.path))
    for scaling in ("strong", "weak"):
        rows_of = table[table["scaling"] == scaling]
        assert list(rows_of["processes"]) == [1, 2, 4]
        assert list(rows_of["speedup"]) == pytest.approx([1, 1.9, 3.2])
        assert list(rows_of["efficiency"]) == pytest.approx([1, 0.95, 0.8])
        assert list(rows_of["communication_share"]) == pytest.approx([0.05, 0.1, 0.2])
        assert list(rows_of["nodes"]) == [1, 2, 4]


def test_hours_of_compute_are_summed_over_sessions_and_processes(tmp_path: Path):
    study, plan = StudyDirectory(tmp_path / "study"), run_record("t", 1.0)
    write_run(study, plan, 0.04, np.random.default_rng(0))
    study.run(plan["run_id"]).events.write_text(
        lines(
            [
                {"event": "started", "time": 0.0, "world_size": 2},
                {"event": "checkpointed", "time": 1800.0},
                {"event": "resumed", "time": 9000.0, "world_size": 2},  # killed in between
                {"event": "evaluating", "time": 9000.0 + 3600},
                {"event": "finished", "time": 9000.0 + 4000},
            ]
        )
    )
    study.plan.write_text(lines([plan]))
    assert gather(study.path).runs.loc[0, "training_hours"] == pytest.approx(2 * 1.5)
