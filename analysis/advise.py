"""With so many GPU-hours: which size, on how much data, and what to expect?

    python -m analysis.advise study=DIR gpu_hours=H

The answer rests on the study's L(N, D) with its bootstraps, on the speeds at which its sizes trained, and on
nothing else: hours buy audio at the speed of the study's hardware (audio-seconds per second and GPU, or core), and of
the sizes between the smallest and the largest trained the one with the least predicted loss is recommended. Speeds
between sizes are interpolated; no size is extrapolated to. Where the law is not identified it is refused.

Exit status: 0; 1 if the study cannot answer, with the reason; 2 for a mistake in the command.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from analysis.claims import Claim, Claims, claims
from analysis.command import run_main
from analysis.fit import BOUND, CONVERGED, UNFINISHED, UNIDENTIFIABLE, Fit, size_interval
from analysis.gather import gather
from analysis.laws import Array
from analysis.quantities import human_count, human_hours, human_interval, human_macs
from analysis.settings import KEYS, UsageError, parsed, settings_from
from scaling.records import RecordError

USAGE = "usage: python -m analysis.advise study=DIR gpu_hours=H"
ADVISE_KEYS = KEYS | {"gpu_hours": "of one GPU (or CPU core) of the study's kind, to spend on one training"}
GRID = 400  # sizes between the smallest and the largest that are compared
FAR = 10.0  # times what the study's runs had: further than a law of them should be trusted
MOST_HOURS = 1e9

REMEDIES = {
    UNIDENTIFIABLE: "vary sizes and budgets, as +sweep=isoflop does",
    BOUND: "its curve holds within the cells alone; add larger budgets or sizes to the sweep (the report says, under "
    "equal compute, what each budget that was trained shows)",
    UNFINISHED: "add cells or seeds to the sweep",
}


@dataclass(frozen=True)
class Advice:
    """What to train, and what to expect.

    options: one row a size of the study: size, N, hours of audio that the budget buys, passes over the data, loss
        with its prediction interval, and in what share of bootstraps it is the best of them.
    best_size: N of the least predicted loss between the sizes trained, with the interval over bootstraps; its ends
        are 0 or infinite where bootstraps have it at the smallest or the largest size.
    about: which cells the law is of.
    """

    gpu_hours: float
    options: pd.DataFrame
    best_size: float
    best_size_interval: tuple[float, float]
    hours: float
    loss: float
    loss_interval: tuple[float, float]
    about: str
    remarks: list[str]


class RefusalError(Exception):
    """The study cannot answer, and why."""


def advise(found: Claims, gpu_hours: float) -> Advice:
    """What to train with so many hours; RefusalError if the law or the speeds are not known."""
    if found.refusal:
        raise RefusalError(found.refusal)
    claim = found.loss("L(N, D)")
    assert claim is not None  # every study has the claim, if not the law
    if claim.fitted.status != CONVERGED:
        raise RefusalError(
            f"L(N, D) of this study is {claim.fitted.status} ({claim.fitted.reason}): {REMEDIES[claim.fitted.status]}"
        )
    if not claim.fitted.has_interval:
        raise RefusalError(
            f"L(N, D) of this study has no interval ({claim.fitted.why_no_interval}): {REMEDIES[UNFINISHED]}"
        )
    if found.data != "audio_hours_seen":
        raise RefusalError(
            "D of this study is distinct audio, which hours of compute do not buy: data=audio_hours_seen"
        )
    runs = found.kept[found.kept["run_id"].isin(claim.run_ids)]
    speeds = training_speeds(runs)
    law = claim.fitted
    level = found.settings.level
    grid = np.geomspace(speeds["N"].min(), speeds["N"].max(), GRID)
    hours = gpu_hours * _speed_at(speeds, grid)
    losses = law.predict({"N": grid, "D": hours})
    drawn = law.predict_bootstraps({"N": grid, "D": hours})
    best = int(np.argmin(losses))
    shortest = float(runs["D"].min())
    if hours[best] * FAR < shortest:
        raise RefusalError(
            f"gpu_hours={gpu_hours:g} buys {human_hours(float(hours[best]))} h of audio, less than a tenth of the "
            f"study's shortest run ({human_hours(shortest)} h), of which its law says nothing; give more hours"
        )
    bests = np.concatenate([[0.0], grid[1:-1], [np.inf]])[np.argmin(drawn, axis=1)]
    low, high = law.prediction_interval({"N": grid[best], "D": hours[best]}, level, seed=found.settings.seed)
    edge = best in (0, GRID - 1)
    return Advice(
        gpu_hours,
        _options(found, runs, law, speeds, gpu_hours),
        float(grid[best]),
        size_interval(bests, level),
        float(hours[best]),
        float(losses[best]),
        (float(low[0]), float(high[0])),
        claim.about,
        _remarks(found, runs, claim, float(hours[best]), float(grid[best]), edge),
    )


def training_speeds(runs: pd.DataFrame) -> pd.DataFrame:
    """Audio-seconds that one GPU or core trains on per second, a row a size: N, size, speed, runs; by N."""
    runs = runs[np.isfinite(runs["audio_seconds_per_second"])]
    if runs.empty:
        raise RefusalError("no run has its speed (audio_seconds_per_second) on record")
    devices = runs["world_size"].fillna(1) * _cpu_threads(runs).fillna(1)
    speed = runs["audio_seconds_per_second"] / devices
    grouped = (
        runs.assign(speed=speed).groupby("size").agg(N=("N", "first"), speed=("speed", "median"), runs=("N", "size"))
    )
    if len(grouped) < 2:
        raise RefusalError("speeds are on record for one size only; two are needed to interpolate between")
    return grouped.reset_index().sort_values("N")


def _cpu_threads(runs: pd.DataFrame) -> pd.Series:
    """Of a process of each run on CPUs; NaN of those on GPUs, and where it is not on record."""
    return pd.to_numeric(runs["hardware.threads"], errors="coerce").astype(float).where(runs["hardware.gpu"] == "none")


def _speed_at(speeds: pd.DataFrame, sizes: Array) -> Array:
    """Between sizes log speed is interpolated linearly in log N."""
    return np.exp(np.interp(np.log(sizes), np.log(speeds["N"]), np.log(speeds["speed"])))


def _options(found: Claims, runs: pd.DataFrame, law: Fit, speeds: pd.DataFrame, gpu_hours: float) -> pd.DataFrame:
    settings = found.settings
    sizes = speeds["N"].to_numpy(dtype=float)
    hours = gpu_hours * speeds["speed"].to_numpy(dtype=float)
    low, high = law.prediction_interval({"N": sizes, "D": hours}, settings.level, seed=settings.seed)
    wins = np.bincount(np.argmin(law.predict_bootstraps({"N": sizes, "D": hours}), axis=1), minlength=len(sizes))
    return pd.DataFrame(
        {
            "size": speeds["size"].to_numpy(),
            "N": sizes,
            "hours": hours,
            "passes": hours / float(runs["hours"].max()),
            "loss": law.predict({"N": sizes, "D": hours}),
            "low": low,
            "high": high,
            "best_in": wins / wins.sum(),
        }
    )


def _remarks(found: Claims, runs: pd.DataFrame, claim: Claim, hours: float, size: float, edge: bool) -> list[str]:
    """runs: those of the law."""
    said = [found.other_axes.remark] if found.other_axes.chosen else []
    said += _mixed_hardware(runs)
    if edge:
        at = "largest" if size >= runs["N"].max() * 0.99 else "smallest"
        said.append(f"The best is the {at} size trained: the true optimum may lie beyond it. Train beyond it to know.")
    shortest, longest = float(runs["D"].min()), float(runs["D"].max())
    if hours < shortest:
        said.append(
            f"This is {hours / shortest:.2g} times the audio of the study's shortest run: below what the law is of."
        )
    if hours > longest:
        far = f"{hours / longest:.3g} times the audio of the study's longest run"
        said.append(f"This is {far}{': too far for the interval to be trusted' if hours > FAR * longest else ''}.")
    compute, most = _training_macs(runs, size, hours), float(runs["C"].max())
    if compute > 1.5 * most:
        far = f"{human_macs(compute)} of training, {compute / most:.3g} times the study's most"
        said.append(f"This is {far}{': too far for the interval to be trusted' if compute > FAR * most else ''}.")
    distinct = float(runs["hours"].max())
    passes, seen = hours / distinct, longest / distinct
    if passes > 1.5 * seen:
        said.append(
            f"{passes:.3g} passes over the data; the study has seen {seen:.3g}, so nothing shows what repetition costs."
        )
    tests = [test for test in claim.held_out if test.verdict != "not possible"]
    verdicts = "; ".join(f"without {test.left_out}: {test.verdict}" for test in tests)
    said.append(f"The law's own test on cells it did not see: {verdicts or 'not possible in this study'}.")
    return said


def _mixed_hardware(runs: pd.DataFrame) -> list[str]:
    """A remark for each part of the machines that differs between these runs: hours of one are not those of another."""
    said = []
    runs = runs.assign(threads=_cpu_threads(runs).astype("Int64"))
    parts = {
        "hardware.gpu": "kinds of GPUs",
        "hardware.cpu": "kinds of CPUs",
        "threads": "numbers of threads a process",
    }
    for part, what in parts.items():
        kinds = runs.loc[runs[part].notna(), ["size", "N", part]].sort_values("N", kind="stable")
        sizes = kinds.groupby(part, sort=False)["size"].agg(lambda of: ", ".join(dict.fromkeys(of)))
        if len(sizes) > 1:
            on = "; ".join(f"{sizes[kind]} on {kind}" for kind in sizes.index)
            said.append(f"The runs trained on {len(sizes)} {what} ({on}): the hours are of no one kind.")
    return said


def _training_macs(runs: pd.DataFrame, size: float, hours: float) -> float:
    """Of a size between those of the runs; a run's are proportional to its MACs a second times its audio."""
    cells = runs.drop_duplicates("N").sort_values("N")
    rate = np.interp(np.log(size), np.log(cells["N"]), np.log(cells["C"] / cells["D"]))
    return float(np.exp(rate) * hours)


def _unit(found: Claims) -> str:
    return "MACs/s" if found.settings.size == "macs_per_second" else "parameters"


def to_terminal(advice: Advice, found: Claims) -> Table:
    """The sizes of the study side by side: what the hours buy of each, and the loss to expect."""
    unit = _unit(found)
    table = Table(title=f"{advice.gpu_hours:g} GPU-hours on one training", title_justify="left", box=None)
    for name in (
        "size",
        unit,
        "hours of audio",
        "passes",
        "expected loss",
        f"{found.settings.level:.0%} interval",
        "best in",
    ):
        table.add_column(name, justify="left" if name == "size" else "right")
    for _, row in advice.options.iterrows():
        table.add_row(
            row["size"],
            human_count(row["N"]),
            human_hours(row["hours"]),
            f"{row['passes']:.3g}",
            f"{row['loss']:.4g}",
            f"{row['low']:.4g} to {row['high']:.4g}",
            f"{row['best_in']:.0%}",
        )
    return table


def summary(advice: Advice, found: Claims) -> str:
    """The best size and what to expect of it, in a sentence."""
    unit = _unit(found)
    return (
        f"Best between the sizes trained: {human_count(advice.best_size)} {unit} "
        f"({human_interval(*advice.best_size_interval)}) on {human_hours(advice.hours)} h of audio seen; "
        f"expected validation loss {advice.loss:.4g} ({advice.loss_interval[0]:.4g} to {advice.loss_interval[1]:.4g}), "
        f"by L(N, D) of {advice.about}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what to train; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument in ("-h", "--help", "help") for argument in arguments):
        lines = [USAGE, "", *(f"  {key}  {what}" for key, what in ADVISE_KEYS.items()), "", (__doc__ or "").strip()]
        print("\n".join(lines))
        return 0
    try:
        values = parsed(arguments, ADVISE_KEYS, ("study", "gpu_hours"), USAGE)
        hours = _positive(values.pop("gpu_hours"))
        settings = settings_from(values)
        found = claims(gather(Path(settings.study)), settings)
        advice = advise(found, hours)
    except (UsageError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RefusalError as refusal:
        print(f"no advice: {refusal}", file=sys.stderr)
        return 1
    Console(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False).print(to_terminal(advice, found))
    print(summary(advice, found))
    for remark in advice.remarks:
        print(f"note: {remark}")
    return 0


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MOST_HOURS:
        raise UsageError(f"gpu_hours={text}: expected a number above 0 and at most {MOST_HOURS:g}")
    return value


if __name__ == "__main__":
    run_main(main, "interrupted: no advice")
