"""Where enhancement helps: the gain over the unprocessed input by its SNR and by its noise, of the compared cells."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.comparable import Comparable
from analysis.gather import UNPROCESSED
from analysis.quantities import Quantity

COLUMNS = ["by", "level", "size", "N", "gain", "standard_error", "utterances", "run_ids"]


def breakdown(cells: Comparable, metric: Quantity) -> pd.DataFrame:
    """A row a level and size: by ("snr_db" or "noise"), level (dB, or the noise's name), size, N, gain (in the metric's
    unit), standard_error (over utterances), utterances, run_ids; no rows of a metric without scores.
    """
    scores = cells.scores
    if metric.key not in scores:
        return pd.DataFrame(columns=COLUMNS)
    scores = scores.assign(gain=scores[metric.key].astype(float) - scores[UNPROCESSED + metric.key].astype(float))
    # The seeds of a size are averaged first: an utterance counts once.
    rows = []
    for by in ("snr_db", "noise"):
        known = scores[scores[by].notna() & scores["gain"].notna()]
        means = known.groupby(["size", "N", by, "id"], observed=True)["gain"].mean().reset_index()
        runs = known.drop_duplicates("run_id").groupby("size", observed=True)["run_id"].agg(" ".join)
        for _, part in means.groupby(["size", "N", by], observed=True):
            size, n, level = part["size"].iloc[0], part["N"].iloc[0], part[by].iloc[0]
            error = part["gain"].std(ddof=1) / np.sqrt(len(part)) if len(part) > 1 else np.nan
            value = float(level) if by == "snr_db" else str(level)
            rows.append(
                {"by": by, "level": value, "size": size, "N": n, "gain": part["gain"].mean()}
                | {"standard_error": error, "utterances": len(part), "run_ids": runs[size]}
            )
    return pd.DataFrame(rows, columns=COLUMNS)
