"""Is one size better than another, utterance by utterance, or did the seeds and the test set decide?

A bootstrap of the difference of mean scores between two sizes: utterances are drawn again (the same ones for
both, since both were scored on them), and the seeds of each size too, with k - 1 of k drawn so that few seeds do not
pass for no spread. p is twice the smaller share of samples on either side of 0, and of all pairs of a metric
Holm's step-down correction (Holm 1979) holds the chance of a single false claim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.fit import quantiles
from analysis.laws import Array
from analysis.quantities import Quantity

COLUMNS = ["metric", "size", "against", "difference", "low", "high", "p", "p_holm", "utterances", "seeds", "run_ids"]
NEIGHBOURS_BEYOND = 6  # of more sizes only neighbours are compared


def paired(
    scores: pd.DataFrame, metrics: Sequence[Quantity], *, bootstraps: int, level: float, seed: int
) -> pd.DataFrame:
    """A row a metric and pair of sizes: mean of `size` minus mean of `against`.

    scores: one row a run and utterance with size, N, run_id, id and a column a metric.
    Utterances that a metric refused in any run are left out for all.
    """
    sizes = list(scores.sort_values("N")["size"].drop_duplicates())
    pairs = (
        list(itertools.combinations(sizes, 2)) if len(sizes) <= NEIGHBOURS_BEYOND else list(itertools.pairwise(sizes))
    )
    rng = np.random.default_rng(seed)
    rows = []
    for metric in metrics:
        if metric.key not in scores or not len(sizes) > 1:
            continue
        tables = _tables(scores, metric.key)
        if tables is None:
            continue
        found = []
        for against, size in pairs:
            one, other = tables[size].to_numpy(dtype=float), tables[against].to_numpy(dtype=float)
            drawn = _differences(one, other, bootstraps, rng)
            low, high = quantiles(drawn, level)
            share = min((drawn <= 0).mean(), (drawn >= 0).mean())
            found.append(
                {
                    "metric": metric.key,
                    "size": size,
                    "against": against,
                    "difference": float(one.mean() - other.mean()),
                    "low": low,
                    "high": high,
                    # no sample on the other side: fewer than one in so many
                    "p": max(2 * float(share), 2 / bootstraps),
                    "utterances": one.shape[1],
                    "seeds": f"{len(one)} and {len(other)}",
                    "run_ids": " ".join([*tables[size].index.astype(str), *tables[against].index.astype(str)]),
                }
            )
        for row, corrected in zip(found, holm([float(str(row["p"])) for row in found]), strict=True):
            rows.append(row | {"p_holm": corrected})
    return pd.DataFrame(rows, columns=COLUMNS)


def _tables(scores: pd.DataFrame, metric: str) -> dict[str, pd.DataFrame] | None:
    """size → (seeds, utterances), the same utterances for all; None if there are none."""
    wide = scores.pivot_table(index=["size", "run_id"], columns="id", values=metric, observed=True, dropna=False)
    wide = wide.dropna(axis=0, how="all").dropna(axis=1, how="any")
    if wide.shape[1] < 2 or wide.index.get_level_values("size").nunique() < scores["size"].nunique():
        return None
    return {str(size): part.droplevel("size") for size, part in wide.groupby(level="size", observed=True)}


def _differences(one: Array, other: Array, bootstraps: int, rng: np.random.Generator) -> Array:
    """Of two sizes' scores (seeds, utterances): bootstrapped differences of means (B,)."""
    count = one.shape[1]
    utterances = rng.multinomial(count, np.full(count, 1 / count), bootstraps) / count  # (B, utterances)

    def means(table: Array) -> Array:
        k = len(table)
        by_seed = utterances @ table.T  # (B, seeds)
        if k == 1:
            return by_seed[:, 0]
        weights = rng.multinomial(k - 1, np.full(k, 1 / k), bootstraps) / (k - 1)
        return np.einsum("bk,bk->b", by_seed, weights)

    return means(one) - means(other)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's corrected p values, in the order given."""
    order = np.argsort(p)
    corrected, highest = np.empty(len(p)), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = highest
    return [float(value) for value in corrected]
