"""The clips of a run that turned out to be damaged, and the crops that took their place.

The stream replaces what it cannot read (see `scaling.stream`) and says so in each batch. Here
that becomes a record, before the step that uses the batch, in the run's folder:

    quarantine/rank-0.jsonl    one row a replaced crop: t, id, shard, what was wrong, by which clip

The record changes nothing in what is read: a crop is replaced if its own blocks are damaged, in
every epoch, on every process and after every resumption alike. With more than
`data.max_damaged_share` of the training clips damaged the run stops.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from scaling.errors import BadDataError
from scaling.records import RunDirectory, append_record, read_appended
from scaling.shards import Clip, ShardIndex, remedy
from scaling.stream import Replaced

log = logging.getLogger(__name__)

NUM_SHOWN = 5


class Quarantine:
    """What a run knows of its damaged clips; every process has one, and writes a file of its own."""

    def __init__(
        self, directory: RunDirectory, index: ShardIndex, clips: Sequence[Clip], max_share: float, rank: int = 0
    ) -> None:
        """BadDataError if the sizes of the shards alone show that too many of the clips are damaged."""
        self.directory, self.index, self.rank = directory, index, rank
        self.num_clips, self.max_share = len(clips), max_share
        self.damaged: set[str] = set()  # the ids of all clips of which a crop was replaced
        self.crops: set[int] = set()  # the global sample counters of all crops that were replaced
        self._read: dict[Path, int] = {}  # bytes of each file
        self._take_up()
        if cut_off := [clip.id for clip in index.cut_off(clips)]:
            log.warning("%d clips lie beyond the end of their shards in %s", len(cut_off), index.root)
        self._check_share(self.damaged | set(cut_off))

    def add(self, replaced: Sequence[Replaced]) -> None:
        """Put a batch's substitutes on record; BadDataError if too many clips are damaged by now."""
        if not replaced:
            return
        for crop in replaced:
            row = {"t": crop.t, "id": crop.clip_id, "shard": crop.shard, "what": crop.what, "by": crop.by}
            append_record(self.directory.quarantine / f"rank-{self.rank}.jsonl", row)
            if crop.clip_id not in self.damaged:
                log.warning(
                    "clip %s in %s is damaged (%s): %s takes its place", crop.clip_id, crop.shard, crop.what, crop.by
                )
        self._take_up()
        self._check_share(self.damaged)

    def num_replaced(self, num_crops: int) -> int:
        """Of the first `num_crops` crops of the run, on all processes, how many were replaced."""
        self._take_up()
        return sum(t < num_crops for t in self.crops)

    def _take_up(self) -> None:
        """Read what has been written since, by this process and the others."""
        for path in self.directory.quarantine.glob("rank-*.jsonl"):
            rows, self._read[path] = read_appended(path, self._read.get(path, 0))
            for row in rows:
                if "t" in row and "id" in row:
                    self.crops.add(row["t"])
                    self.damaged.add(row["id"])

    def _check_share(self, damaged: set[str]) -> None:
        if len(damaged) > self.max_share * self.num_clips:
            shown = ", ".join(sorted(damaged)[:NUM_SHOWN]) + (", …" if len(damaged) > NUM_SHOWN else "")
            raise BadDataError(
                f"{len(damaged)} of {self.num_clips} training clips in {self.index.root} are damaged "
                f"({len(damaged) / self.num_clips:.2%}; {shown}), more than data.max_damaged_share = "
                f"{self.max_share:g}: {remedy(self.index.root)}, and delete {self.directory.path}, which has them on "
                "record; or raise the share"
            )
