"""The tables of what is claimed say of what, name the runs behind each row, and have the numbers in their CSV."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.claims import claims
from analysis.gather import gather
from analysis.isoflop import IsoFlop, isoflop
from analysis.law_tables import isoflop_table, laws_table
from analysis.paper_tables import efficiency_table
from analysis.quantities import human_count
from analysis.settings import Settings
from scaling.records import StudyDirectory
from tests.analysis.generated import FAMILY, grid_study, lines, run_record, true_loss, write_run


def sizes_study(path: Path, seeds: dict[str, int]) -> StudyDirectory:
    """Sizes at one budget of audio, of so many seeds each."""
    study, rng, plans = StudyDirectory(path), np.random.default_rng(1), []
    for size, count in seeds.items():
        for seed in range(count):
            plans.append(run_record(size, 100.0, seed))
            write_run(study, plans[-1], true_loss(size, 100.0) * float(np.exp(rng.normal(0, 0.003))), rng)
    study.plan.write_text(lines(plans))
    return study


@pytest.mark.parametrize(("seeds", "said"), [((1, 1), "one seed"), ((3, 1), "1 to 3 seeds")])
def test_why_a_law_has_no_intervals_counts_the_seeds_that_its_cells_have(
    tmp_path: Path, seeds: tuple[int, int], said: str
):
    path = sizes_study(tmp_path / "study", dict.fromkeys(("c8", "xt", "c24"), seeds[0]) | {"t": seeds[1]}).path
    found = claims(gather(path), Settings(path, bootstraps=100))
    table = laws_table(found.losses, "laws", "Laws", found.settings.level)
    assert f"no intervals: 4 cells of {said} leave 1 degree of freedom, of at least 3" in table.text.loc[0, "Status"]


@pytest.mark.parametrize(
    ("draw", "text"),
    [(0.0, "below the smallest"), (np.inf, "beyond the largest"), (3e8, "300 M to 300 M")],
)
def test_an_interval_of_which_all_draws_lie_on_one_side_is_that_side(tmp_path: Path, draw: float, text: str):
    path = grid_study(tmp_path / "study", sizes=("c8", "xt", "c24", "t"), pmacs=(0.3,), seeds=2).path
    found = claims(gather(path), Settings(path, bootstraps=100))
    iso = isoflop(found.kept, bootstraps=100, seed=0)
    drawn = IsoFlop([replace(p, bootstrap=np.full(100, draw)) for p in iso.parabolas], iso.path, freedom=iso.freedom)
    assert list(isoflop_table(drawn, found).text["Interval"]) == [text]


# --- cost ----------------------------------------------------------------------------------


def test_training_macs_per_wall_second_are_three_forward_passes_at_the_speed_of_training(tmp_path: Path):
    path = sizes_study(tmp_path / "study", {"c8": 1, "t": 1}).path
    study = gather(path)
    table = efficiency_table(study, claims(study, Settings(path, bootstraps=100)))
    assert "MACs/s achieved" not in table.text
    for row, size in zip(table.data.to_dict("records"), ("c8", "t"), strict=True):
        speed = study.runs.loc[study.runs["size"] == size, "audio_seconds_per_second"].item()
        assert row["training_macs_per_wall_second"] == pytest.approx(3 * FAMILY[size][4] * speed)
    shown = human_count(table.data["training_macs_per_wall_second"][1])
    assert table.text.loc[1, "Training MACs per wall second"] == shown
    assert "Training MACs per wall second: three times the MACs of a forward pass" in table.caption
