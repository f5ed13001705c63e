"""Studies of any size whose losses follow a known law, written as runs leave them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.laws import joint_law
from scaling.records import Record, StudyDirectory, to_json

# name → (width, depth, parameters, without the mask decoder, MACs a second): the family's, counted from the code
FAMILY = {
    "c8": (8, 6, 125_000, 41_000, 63_400_000),
    "xt": (16, 6, 337_820, 136_724, 244_800_000),
    "c24": (24, 6, 643_000, 290_000, 544_000_000),
    "t": (32, 6, 1_039_148, 512_036, 961_900_000),
    "c48": (48, 6, 2_110_000, 1_080_000, 2_150_000_000),
    "s": (64, 6, 3_541_580, 1_981_508, 3_812_000_000),
}
LAW = {"E": 0.02, "A": 26.0, "alpha": 0.4, "B": 0.06, "beta": 0.45}  # of MACs a second and hours of audio seen
RATE = "train.optimiser.learning_rate"
COST = 3 * 3600  # multiply-accumulates of training are COST * MACs a second * hours seen


def run_record(
    size: str, hours_seen: float, seed: int = 0, hours: float = 9.0, processes: int = 1, axes: Record | None = None
) -> Record:
    width, depth, num_params, non_decoder, macs = FAMILY[size]
    steps = max(1, round(hours_seen * 3600 / 128))  # of 64 crops of 2 s
    return {
        "run_id": f"{size}-{hours_seen:.4g}h-p{processes}-seed{seed}",
        "name": f"{size}-seed{seed}",
        "axes": {"model": size, "seed": seed, **(axes or {})},
        "seed": seed,
        "size": {
            "name": size,
            "num_params": num_params,
            "num_params_folded": num_params - 3000,
            "num_params_non_decoder": non_decoder,
            "macs_per_second": macs,
        },
        "data": {"name": "generated", "hours": hours, "num_clips": 11_000, "index_hash": "ab12"},
        "steps": steps,
        "global_batch": 64,
        "crop_seconds": 2.0,
        "audio_hours_seen": hours_seen,
        "train_macs": COST * macs * hours_seen,
        "estimated_hours": hours_seen * 3600 * macs / 1e9 * 0.002 / 3600,
        "science": {
            "seed": seed,
            "model": {"num_channels": width, "num_layers": depth},
            "train": {"optimiser": {"warmup_steps": 20}},
        },
    }


def true_loss(size: str, hours_seen: float) -> float:
    return float(joint_law(FAMILY[size][4], hours_seen, **LAW))


def write_run(
    study: StudyDirectory, plan: Record, loss: float, rng: np.random.Generator, rows: int = 20, utterances: int = 12
) -> None:
    """A finished run's records. Its metrics follow from its loss, its speed from its size."""
    run = study.run(plan["run_id"])
    run.path.mkdir(parents=True, exist_ok=True)
    macs, steps = plan["size"]["macs_per_second"], plan["steps"]
    speed = 1e9 / (0.001 * macs + 4e5)  # audio-seconds per second
    began = 1.7e9
    seconds = plan["audio_hours_seen"] * 3600 / speed
    provenance = {"commit": "6df9ffe", "packages": {"torch": "2.13.0"}}
    run.plan.write_text(to_json(plan | {"provenance": provenance}))
    hardware = {"host": "node1", "cpu": "a CPU", "gpu": None, "num_cpus": 2}
    events = [
        {"event": "submitted", "time": began - 5},
        {"event": "started", "time": began, "hardware": hardware, "world_size": 1},
        {"event": "checkpointed", "time": began + seconds / 2, "step": steps // 2},
        {"event": "evaluating", "time": began + seconds, "step": steps},
        {"event": "finished", "time": began + seconds + 60, "step": steps, "num_utterances": utterances},
    ]
    run.events.write_text(lines(events))
    metrics: list[Record] = []
    for step in np.unique(np.linspace(1, steps, rows).astype(int)):
        value = loss * (1 + 2 * (step / steps) ** -0.3 - 2 + rng.normal(0, 0.01))
        metrics.append(
            {
                "kind": "train",
                "step": int(step),
                "time": began + seconds * step / steps,
                "loss": value,
                "terms": {name: value / 4 for name in ("magnitude", "complex", "consistency", "waveform")},
                "learning_rate": 2e-3,
                "gradient_norm": 0.1,
                "audio_seconds_per_second": speed * rng.uniform(0.95, 1.05),
                "memory_gib": 1.2,
            }
        )
    for share in (0.25, 0.5, 0.75, 1.0):
        value = loss * (1 + 0.5 * (share**-0.3 - 1))
        metrics.append(
            {"kind": "validation", "step": max(1, round(steps * share)), "time": began + seconds * share}
            | {"loss": value, "unprocessed_loss": 0.0567, "si_sdr": 10.0, "unprocessed_si_sdr": 9.0}
        )
    run.metrics.write_text(lines(metrics))
    run.scores.write_text(lines(score_rows(loss, rng, utterances)))


def score_rows(loss: float, rng: np.random.Generator, utterances: int) -> list[Record]:
    noises = ("bus", "cafe", "living", "office", "psquare")
    rows = []
    for number in range(utterances):
        snr_db = (2.5, 7.5, 12.5, 17.5)[number % 4]
        hard = (17.5 - snr_db) / 15
        row: Record = {
            "id": f"p232_{number:03d}",
            "speaker": "p232" if number % 2 else "p257",
            "noise": noises[number % 5],
            "snr_db": snr_db,
            "duration": 2.5,
        }
        values = {
            "pesq_wb": (1.5 + 2.6 * np.exp(-20 * (loss - 0.02)) - 0.8 * hard, 2.3 - 0.9 * hard, 0.05),
            "stoi": (0.99 - 1.1 * (loss - 0.015) - 0.05 * hard, 0.95 - 0.1 * hard, 0.004),
            "estoi": (0.95 - 2.2 * (loss - 0.015) - 0.1 * hard, 0.9 - 0.25 * hard, 0.006),
            "si_sdr": (20 - 180 * (loss - 0.02) - 6 * hard, snr_db, 0.3),
        }
        for name, (enhanced, unprocessed, scatter) in values.items():
            row[name] = round(float(enhanced + rng.normal(0, scatter)), 5)
            row[f"unprocessed_{name}"] = round(float(unprocessed), 5)
        rows.append(row | {"refused": {}})
    return rows


def lines(records: Sequence[Record]) -> str:
    return "".join(to_json(record) + "\n" for record in records)


def grid_study(
    path: Path,
    sizes: Sequence[str] = tuple(FAMILY),
    pmacs: Sequence[float] = (0.1, 0.3, 1.0, 3.0),
    seeds: int = 3,
    noise: float = 0.004,
    **about: Any,
) -> StudyDirectory:
    """Sizes x budgets of equal compute (in 10^15 multiply-accumulates of training), with seeds."""
    study, rng, plans = StudyDirectory(path), np.random.default_rng(0), []
    os.makedirs(path, exist_ok=True)
    for budget in pmacs:
        for size in sizes:
            hours = budget * 1e15 / COST / FAMILY[size][4]
            for seed in range(seeds):
                plan = run_record(size, hours, seed, axes={"train.budget.train_pmacs": budget})
                write_run(study, plan, true_loss(size, hours) * float(np.exp(rng.normal(0, noise))), rng, **about)
                plans.append(plan)
    study.plan.write_text(lines(plans))
    return study


def sizes_study(
    path: Path, noise: float = 0.003, seeds: int = 3, sizes: Sequence[str] = tuple(FAMILY)
) -> StudyDirectory:
    """Sizes at one budget of audio."""
    study, rng, plans = StudyDirectory(path), np.random.default_rng(1), []
    for size in sizes:
        for seed in range(seeds):
            plan = run_record(size, 100.0, seed)
            write_run(study, plan, true_loss(size, 100.0) * float(np.exp(rng.normal(0, noise))), rng)
            plans.append(plan)
    study.plan.write_text(lines(plans))
    return study


def write_grid(path: Path, cells: Sequence[Record], loss: Callable[[Record], float], seeds: int = 2) -> StudyDirectory:
    """cells: size, hours_seen, hours of data and further axes of each; what its science, configuration and data add."""
    study, rng, plans = StudyDirectory(path), np.random.default_rng(0), []
    for number, cell in enumerate(cells):
        for seed in range(seeds):
            plan = run_record(cell["size"], cell["hours_seen"], seed, hours=cell["hours"], axes=cell["axes"])
            plan["run_id"] = f"cell{number}-{plan['run_id']}"
            for group, settings in cell.get("science", {}).items():
                plan["science"].setdefault(group, {}).update(settings)
            plan["config"] = cell.get("config")
            plan["data"] |= cell.get("data", {})
            write_run(study, plan, loss(cell) * float(np.exp(rng.normal(0, 0.003))), rng)
            plans.append(plan)
    study.plan.write_text(lines(plans))
    return study
