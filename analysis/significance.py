"""Is one size better than another, utterance by utterance, or did the seeds and the test set decide?

A bootstrap of the difference of mean scores between two sizes: utterances are drawn again (the same ones for all
sizes, since all were scored on them), and seeds scatter by Student's t, with the variance that each size's seeds
have of their own (Welch 1947) and Satterthwaite's degrees of freedom, so that few seeds do not pass for little spread,
nor many seeds of a steady size for those of an unsteady one. p is twice the smaller share of samples on either side of
0, (k + 1) / (B + 1) where k of B are, and of all pairs of a metric Holm's step-down correction (Holm 1979) holds the
chance of a single false claim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.fit import quantiles
from analysis.laws import Array
from analysis.quantities import Quantity

COLUMNS = ["metric", "size", "against", "difference", "low", "high", "p", "p_holm", "is_bound", "of_runs_alone"]
COLUMNS += ["utterances", "seeds", "run_ids"]
NEIGHBOURS_BEYOND = 6  # of more sizes only neighbours are compared
FEWEST_SAMPLES = 10_000  # so that Holm's correction of the least p among the pairs of six sizes is far below 0.05
FEWEST_SEEDS = 2  # of both sizes; with fewer of either there is no p
CHUNK = 1000  # samples at once


def paired(
    scores: pd.DataFrame, metrics: Sequence[Quantity], *, bootstraps: int, level: float, seed: int
) -> pd.DataFrame:
    """A row a metric and pair of sizes: mean of `size` minus mean of `against`, with interval and p.

    of_runs_alone: a size has too few seeds to know their scatter; the interval is of utterances, and there is no p.
    is_bound: no sample lies on the other side of 0, and p and p_holm are what they are below.
    bootstraps: samples, if more than FEWEST_SAMPLES.
    scores: one row a run and utterance with size, N, run_id, id and a column a metric.
    Utterances that a metric refused in any run are left out for all, and so are sizes of which it has no score.
    """
    ordered = list(scores.sort_values("N")["size"].drop_duplicates())
    bootstraps = max(bootstraps, FEWEST_SAMPLES)
    rng = np.random.default_rng(seed)
    rows = []
    for metric in metrics:
        if metric.key not in scores:
            continue
        tables = _tables(scores, metric.key)
        if tables is None:
            continue
        sizes = [size for size in ordered if size in tables]
        is_few = len(sizes) <= NEIGHBOURS_BEYOND
        pairs = list(itertools.combinations(sizes, 2)) if is_few else list(itertools.pairwise(sizes))
        found = []
        means = dict(zip(sizes, _drawn_means([tables[size] for size in sizes], bootstraps, rng).T, strict=True))
        for against, size in pairs:
            one, other = tables[size].to_numpy(dtype=float), tables[against].to_numpy(dtype=float)
            has_p = min(len(one), len(other)) >= FEWEST_SEEDS
            drawn, p, least = means[size] - means[against], np.nan, 0
            if has_p:
                deviation, freedom = _seed_scatter(one, other)
                drawn = drawn + deviation * rng.standard_t(freedom, bootstraps)
                least = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
                p = min(1.0, 2 * (least + 1) / (bootstraps + 1))
            low, high = quantiles(drawn, level)
            found.append(
                {
                    "metric": metric.key,
                    "size": size,
                    "against": against,
                    "difference": float(one.mean() - other.mean()),
                    "low": low,
                    "high": high,
                    "p": p,
                    "is_bound": has_p and least == 0,
                    "of_runs_alone": not has_p,
                    "utterances": one.shape[1],
                    "seeds": f"{len(one)} and {len(other)}",
                    "run_ids": " ".join([*tables[size].index.astype(str), *tables[against].index.astype(str)]),
                }
            )
        for row, corrected in zip(found, holm([float(str(row["p"])) for row in found]), strict=True):
            rows.append(row | {"p_holm": corrected})
    return pd.DataFrame(rows, columns=COLUMNS)


def _tables(scores: pd.DataFrame, metric: str) -> dict[str, pd.DataFrame] | None:
    """size → (seeds, utterances), the same utterances for all sizes that have scores; None if there are none of two."""
    wide = scores.pivot_table(index=["size", "run_id"], columns="id", values=metric, observed=True, dropna=False)
    wide = wide.dropna(axis=0, how="all").dropna(axis=1, how="any")
    if wide.shape[1] < 2 or wide.index.get_level_values("size").nunique() < 2:
        return None
    return {str(size): part.droplevel("size") for size, part in wide.groupby(level="size", observed=True)}


def _drawn_means(tables: Sequence[pd.DataFrame], bootstraps: int, rng: np.random.Generator) -> Array:
    """Of sizes' scores (seeds, utterances): their means (B, sizes) over the same utterances drawn again."""
    scores = np.stack([table.to_numpy(dtype=float).mean(axis=0) for table in tables], axis=1)  # (utterances, sizes)
    count = len(scores)
    means = np.empty((bootstraps, len(tables)))
    for first in range(0, bootstraps, CHUNK):
        part = means[first : first + CHUNK]
        part[:] = rng.multinomial(count, np.full(count, 1 / count), len(part)) @ scores / count
    return means


def _seed_scatter(one: Array, other: Array) -> tuple[float, float]:
    """Standard deviation of the difference of two sizes' means over seeds, and Satterthwaite's degrees of freedom."""
    freedoms = np.array([len(one) - 1, len(other) - 1])
    variances = np.array([values.mean(axis=1).var(ddof=1) / len(values) for values in (one, other)])
    total = float(variances.sum())
    if total == 0:
        return 0.0, float(freedoms.sum())
    shares = variances / total
    return float(np.sqrt(total)), float(1 / (shares**2 / freedoms).sum())


def holm(p: Sequence[float]) -> list[float]:
    """Holm's corrected p values, in the order given; NaN stays and does not count."""
    tested = int(np.isfinite(p).sum())
    order = np.argsort(p)[:tested]  # NaN comes last
    corrected, highest = np.full(len(p), np.nan), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (tested - rank) * p[index]))
        corrected[index] = highest
    return [float(value) for value in corrected]
