"""One run, here.

    python -m scaling.train model=xxt                     train and score it
    python -m scaling.train model=xxt train.test=true     everything once, quickly
    accelerate launch -m scaling.train model=xxt          the same, in one process

The same command again goes on from the last checkpoint; a finished run is not trained again.
Settings: docs/configuration.md.
"""

from __future__ import annotations

from scaling.cli import load_config, run_main
from scaling.config import RunConfig
from scaling.plan import plan_run, require_writable
from scaling.prepare import open_shards
from scaling.run import execute


def main(words: list[str]) -> int:
    config = load_config(RunConfig, "run", words)
    plan = plan_run(config, open_shards(config.data))
    require_writable(plan.directory.path)
    print(f"run {plan.run_id}: {plan.steps} steps, in {plan.directory.path}", flush=True)
    return execute(plan)


if __name__ == "__main__":
    run_main(main, __doc__ or "")
