"""The real-time factor of every architecture that a study plans, for its scaling table.

    python -m scaling.rtf study=DIR

measures each as `python -m bsrnn.rtf` does a size, on one thread of this machine, and writes DIR/rtf.jsonl anew once it
has them all, so that the rows are of one machine. An architecture is what the plan has of the model: width, depth,
front end, norm, and whether it is causal. One that does not stream has no row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import MISSING

from bsrnn import BSRNNConfig
from bsrnn.rtf import measure, table_heading, table_line
from scaling.cli import load_config, to_object
from scaling.command import run_main
from scaling.config import ModelConfig
from scaling.errors import UserError
from scaling.records import Record, RecordError, StudyDirectory, to_json, write_records

SECONDS = 1.0  # of audio a turn


@dataclass
class RtfConfig:
    study: str = MISSING  # the study's folder


def architectures(study: StudyDirectory) -> Iterator[tuple[str, Record, BSRNNConfig]]:
    """The name of the size, the plan's `science.model` and the network of each architecture, in the plan's order."""
    seen = set()
    for row in study.read_plan():
        try:
            model = row["science"]["model"]
            if to_json(model) in seen:
                continue
            config = to_object(ModelConfig, row["config"]["model"])
        except (KeyError, TypeError, UserError) as error:
            raise RecordError(
                f"{study.plan}: run {row.get('run_id')} was planned by another version of this project ({error}): "
                "plan the study again"
            ) from None
        seen.add(to_json(model))
        yield config.name, model, config.architecture(None)


def main(words: list[str]) -> int:
    study = StudyDirectory(Path(load_config(RtfConfig, "rtf", words).study))
    planned = list(architectures(study))
    rows = []
    print(table_heading())
    for size, model, architecture in planned:
        variant = [f"{name}={value}" for name, value in model.items() if name not in ("num_channels", "num_layers")]
        label = " ".join([size, *variant])
        if architecture.streams:
            found = measure(architecture, SECONDS)
            rows.append({"size": size, "model": model, **asdict(found)})
            print(table_line(label, found), flush=True)
        else:
            print(f"{label:>8}  does not stream")
    write_records(study.rtf, rows)
    print(f"{len(rows)} of {len(planned)} architectures: {study.rtf}; python -m analysis.report shows them")
    return 0


if __name__ == "__main__":
    run_main(main, __doc__ or "", interrupted="interrupted: rtf.jsonl is as it was")
