"""Studies as the other rooms leave them, written through `scaling.records`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from analysis.claims import Claims, claims
from analysis.gather import gather
from analysis.settings import Settings
from scaling.records import Record, StudyDirectory, to_json, write_records, write_whole
from tests.analysis.generated import grid_study

# name → parameters, folded, without the mask decoder, MACs a second
SIZES = {
    "xxt": (254_492, 251_352, 53_396, 90_100_000),
    "xt": (337_820, 334_424, 136_724, 244_800_000),
    "t": (1_039_148, 1_033_384, 512_036, 961_900_000),
}

WIDTHS = {"xxt": 8, "xt": 16, "t": 32}


def plan_row(size: str = "xt", seed: int = 0, hours: float = 0.37, **axes: Any) -> Record:
    num_params, folded, non_decoder, macs = SIZES[size]
    name = "-".join([size, f"{hours:g}h", *(f"{value}" for value in axes.values()), f"seed{seed}"])
    return {
        "run_id": f"{name}-3f2a9c1b",
        "name": name,
        "axes": {"model": size, "data.hours": hours, "seed": seed, **axes},
        "seed": seed,
        "size": {
            "name": size,
            "num_params": num_params,
            "num_params_folded": folded,
            "num_params_non_decoder": non_decoder,
            "macs_per_second": macs,
        },
        "data": {"name": "demo", "hours": hours, "num_clips": 380, "index_hash": "ab12"},
        "steps": 40,
        "global_batch": 8,
        "crop_seconds": 1.0,
        "audio_hours_seen": 0.333,
        "estimated_hours": 0.08,
        "science": {
            "model": {"num_channels": WIDTHS[size]} | ({"norm": norm} if (norm := axes.get("model.norm")) else {}),
            "seed": seed,
            "train": {"learning_rate": 0.002},
        },
    }


def score_row(number: int, **changes: Any) -> Record:
    """A test utterance; by default every metric gains with the number of the utterance."""
    row = {
        "id": f"p232_{number:03d}",
        "speaker": "p232",
        "noise": "bus",
        "snr_db": 2.5 + number,
        "duration": 2.0,
        "pesq_wb": 2.0 + number / 10,
        "stoi": 0.9,
        "estoi": 0.8,
        "si_sdr": 10.0 + number,
        "unprocessed_pesq_wb": 1.5,
        "unprocessed_stoi": 0.85,
        "unprocessed_estoi": 0.7,
        "unprocessed_si_sdr": 5.0,
        "refused": {},
    }
    return row | changes


WriteStudy = Callable[..., StudyDirectory]


@pytest.fixture
def write_study(tmp_path: Path) -> WriteStudy:
    """write_study(plan, losses={run_id: final loss}, scores={run_id: rows}, skip=(run_ids left to the test))."""

    def write(
        plan: Sequence[Record],
        losses: Mapping[str, float] | None = None,
        scores: Mapping[str, Sequence[Record]] | None = None,
        skip: Sequence[str] = (),
    ) -> StudyDirectory:
        study = StudyDirectory(tmp_path / "study")
        write_records(study.plan, plan)
        for row in plan:
            if row["run_id"] in skip:
                continue
            run = study.run(row["run_id"])
            provenance = {"commit": "6df9ffe", "packages": {"torch": "2.9.1"}}
            write_whole(run.plan, to_json(row | {"provenance": provenance}))
            run.log_event("submitted")
            run.log_event("started")
            final = (losses or {}).get(row["run_id"], 0.25)
            for step in range(1, row["steps"] + 1):
                terms = {"magnitude": final / 2}
                run.log_metrics("train", step, loss=final + 1 / step, terms=terms, learning_rate=1e-3)
                if step % 10 == 0:
                    loss = final if step == row["steps"] else final + 1 / step
                    run.log_metrics("validation", step, loss=loss, terms=terms, unprocessed_loss=0.4, si_sdr=8.0)
            write_records(run.scores, (scores or {}).get(row["run_id"], [score_row(number) for number in range(8)]))
            run.log_event("finished")
        return study

    return write


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> StudyDirectory:
    """6 sizes x 4 budgets of equal compute x 3 seeds, whose best sizes lie within."""
    return grid_study(tmp_path_factory.mktemp("grid") / "study")


@pytest.fixture(scope="session")
def found(grid: StudyDirectory) -> Claims:
    return claims(gather(grid.path), Settings(grid.path, bootstraps=300))


def legend_of(figure: Figure) -> dict[str, list[str]]:
    """The title of the first row's legend, and what it names beside the unprocessed input."""
    legend = next(ax.get_legend() for ax in figure.axes if ax.get_legend())
    names = [text.get_text() for text in legend.get_texts()]
    return {legend.get_title().get_text(): [name for name in names if name != "unprocessed"]}
