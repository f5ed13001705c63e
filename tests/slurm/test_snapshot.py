"""Jobs run the code that was submitted, though the checkout changes afterwards."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from scaling.records import StudyDirectory
from tests.slurm.conftest import events_of, launch, runs_of, story, wait_for

ROOT = Path(__file__).parents[2]


def test_a_checkout_that_is_broken_after_the_submission_breaks_no_job(slurm_words: list[str], tmp_path: Path):
    checkout = tmp_path / "checkout"
    for folder in ("bsrnn", "scaling", "launch", "analysis", "conf"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    study = tmp_path / "study"
    # From within the checkout, as a user does: the job's working directory is the checkout too.
    script = f'cd {checkout} && PYTHONPATH={checkout} exec {sys.executable} -m launch.sweep "$@"'
    words = [*slurm_words, f"study={study}", "cluster.nodes=1", "cluster.additional_parameters={begin:'now+3'}"]
    subprocess.run(["bash", "-c", script, "-", *words], check=True, timeout=120)
    for path in (checkout / "scaling").glob("*.py"):
        path.write_text("raise RuntimeError('the checkout has changed')\n")
    (run,) = runs_of(study)
    wait_for(lambda: events_of(run, "ended"), "the run is over")
    assert run.state()[0] == "finished", story(run)
    assert "commit" in run.read_plan()["provenance"]
    (started,) = events_of(run, "started")
    assert started["hardware"]["lstm"] == "compiled"  # its C source is in the copy too
    # The same code is copied once.
    launch("sweep", *slurm_words, f"study={study}", "sweep.axes.seed=[1]")
    launch("cancel", f"study={study}")
    assert len(list((StudyDirectory(study).path / "code").iterdir())) == 1
