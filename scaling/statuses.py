"""With which statuses a run's processes end, beside 0, 1 and 2; for those too that must not load torch."""

PREEMPTED = 75  # it was asked to stop and has saved: execute it again to go on
LOST = 76  # another process of the run is lost
