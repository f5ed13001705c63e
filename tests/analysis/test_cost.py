"""What was estimated stands beside what it took."""

from __future__ import annotations

import pytest

from analysis.cost import cost_frame, cost_table
from analysis.gather import gather
from tests.analysis.conftest import WriteStudy, plan_row


def test_training_is_measured_by_its_speeds_and_the_job_by_its_attempts(write_study: WriteStudy):
    plan = [plan_row(seed=0), plan_row(seed=1), plan_row("xxt", seed=0)]
    study = write_study(plan, skip=[row["run_id"] for row in plan])
    for row, speeds in zip(plan, ((4.0, 8.0), (8.0, 8.0), ()), strict=True):
        run = study.run(row["run_id"])
        run.log_event("started")
        for step, speed in zip((10, 40), speeds, strict=False):
            run.log_metrics("train", step, loss=0.1, audio_seconds_per_second=speed)
        for seconds in (3600.0, 1800.0) if speeds else ():
            run.log_event("ended", seconds=seconds, device_hours=seconds * 4 / 3600)
        run.log_event("finished")
    costs = cost_frame(gather(study.path)).set_index("run_id")
    first = costs.loc[plan[0]["run_id"]]
    # 10 steps of 8 crops of a second at 4, 30 at 8
    assert first["training_hours"] == pytest.approx((80 / 4 + 240 / 8) / 3600)
    assert (first["attempts"], first["hours"], first["device_hours"]) == (2, 1.5, 6.0)
    table = cost_table(gather(study.path)).set_index("Size")
    actual = ((80 / 4 + 240 / 8) + 320 / 8) / 2 / 3600
    assert table.loc["xt", "Actual over estimated"] == f"{actual / 0.08:.3g}"
    assert table.loc["xt", "Estimated training (h)"] == "0.08"
    assert table.loc["xxt", "Actual training (h)"] == "–"
    assert table.loc["xxt", "Device-hours"] == "–"
