"""From a sweep's configuration to its planned runs, and the table of them that a dry run prints."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import replace

from rich.table import Table

from launch.cells import CellComposer, split, without_axes
from launch.config import ClusterConfig, StudyConfig
from launch.costs import Costs, in_hours
from scaling.cli import compose_config, to_object, with_values
from scaling.config import DataConfig
from scaling.errors import UserError
from scaling.grid import Cell, SweepConfig
from scaling.plan import DataBudget, RunPlan, plan_run
from scaling.prepare import open_shards
from scaling.records import StudyDirectory, write_records
from scaling.shards import ShardIndex

log = logging.getLogger(__name__)

FEWEST_WARMUPS = 3  # of steps, for a run to be more than its warm-up; the analysis leaves the others out
MOST_PASSES = 500  # over the data: as many as the published recipe makes
MOST_NAMES = 4
MOST_ROWS = 200  # of the table of runs


def load_study(words: Sequence[str]) -> StudyConfig:
    """The sweep's configuration, with its first cell's values: what no cell has needs to make no sense.

    Of the cluster only those that every cell gives, because cells that give none have this configuration's.
    """
    composed = compose_config(StudyConfig, "study", words)
    sweep = to_object(SweepConfig, composed.sweep)
    _refuse_overridden_axes(sweep, words)
    cells = sweep.cells()
    choices, values = split(cells[0])
    values = {
        key: value
        for key, value in values.items()
        if not key.startswith("cluster.") or all(key in cell for cell in cells)
    }
    composed = compose_config(StudyConfig, "study", [*without_axes(words), *choices])
    config = to_object(StudyConfig, with_values(composed, values, StudyConfig))
    config.sweep = sweep
    if config.train.test:  # quick checks stay out of the study they check
        config.study += "-test"
    return config


def plan_study(config: StudyConfig, words: Sequence[str]) -> list[RunPlan]:
    """Every cell of the sweep as a planned run, longest first; UserError if a cell cannot be.

    words: the command line's overrides, which every cell starts from
    """
    assert config.sweep is not None
    for rule in config.sweep.idle_rules():
        log.warning("sweep.exclude: %s drops no cell: no cell has these values", _rule(rule))
    plans: dict[str, RunPlan] = {}  # by their science, of which a size's name is no part, and label
    names: dict[str, RunPlan] = {}
    indices: dict[str, ShardIndex] = {}
    budgets: dict[tuple[str, float | None, int, bool], DataBudget] = {}
    costs = Costs(config.cluster)
    composer = CellComposer(words, config.study)
    cells = config.sweep.cells()
    for cell in cells:
        run = composer.run(cell)
        index = _open_once(run.data, indices)
        data = (run.data.shards, run.data.hours, run.data.order_seed, run.data.train_on_validation)
        if data not in budgets:
            budgets[data] = DataBudget.of(run, index)
        plan = plan_run(run, index, cell, budgets[data])
        label = _execution_label(cell) if config.sweep.compares_execution else ""
        plan = replace(plan, estimated_hours=costs.training_hours(plan), label=label)
        same = plan.science_digest + label
        if same in plans:
            raise UserError(
                f"sweep {config.sweep.name}: cells {plans[same].axes} and {cell} are the same run "
                f"{plan.run_id}: their axes differ in no scientific setting; remove one, or, where execution is what "
                "is studied, set sweep.compares_execution=true"
            )
        other = names.setdefault(plan.run_id, plan)
        if other is not plan:
            raise UserError(
                f"sweep {config.sweep.name}: cells {other.axes} and {cell} are two runs of one name, {plan.run_id}, "
                "whose hash is too short to tell them apart: plan one in a study of its own, or with another seed"
            )
        plans[same] = plan
    return sorted(plans.values(), key=lambda plan: -(plan.estimated_hours or plan.train_macs))


def _execution_label(cell: Cell) -> str:
    """What a run's name says of how it is executed: by its cell alone, so that more values of an axis rename no run."""
    axes = sorted(axis for axis in cell if axis.startswith(("cluster.", "execution.")))
    return "".join(f"-{axis.rpartition('.')[2]}{_in_a_name(str(cell[axis]))}" for axis in axes)


def _in_a_name(value: str) -> str:
    """A value as part of a folder's name: what may not stand there replaced, with a hash of what it was."""
    text = re.sub(r"[^\w.+]+", "-", value)
    return text if text == value else f"{text.strip('-')}-{hashlib.sha256(value.encode()).hexdigest()[:4]}"


def write_plan(study: StudyDirectory, plans: Sequence[RunPlan]) -> None:
    """Put the plan on record: plan.jsonl of the study. Each run's folder is made where it is executed."""
    write_records(study.plan, [plan.to_record() for plan in plans])


def plan_table(plans: Sequence[RunPlan], cluster: ClusterConfig) -> Table:
    """The runs with what they cost and what has become of them."""
    table = Table(title=f"{len(plans)} run{'s' * (len(plans) != 1)}", title_justify="left", box=None, pad_edge=False)
    others = _other_axes(plans)
    titles = [axis.rpartition(".")[2] for axis in others]
    columns = ("params", "MACs/s", "data (h)", "steps", "audio seen (h)", "passes", "time", "state")
    for name in ("run", "size", *titles, *columns):
        table.add_column(name, justify="left" if name in ("run", "size", "state") else "right", no_wrap=name == "run")
    for plan in plans[:MOST_ROWS]:
        row = plan.to_record()
        table.add_row(
            plan.run_id,
            plan.config.model.name,
            *(str(plan.axes.get(axis, "")) for axis in others),
            _with_unit(row["size"]["num_params"]),
            _with_unit(row["size"]["macs_per_second"]),
            f"{plan.hours:.3g}",
            f"{plan.steps:,}",
            f"{row['audio_hours_seen']:.3g}",
            f"{row['audio_hours_seen'] / plan.hours:.2g}",
            "?" if plan.estimated_hours is None else f"~{in_hours(plan.estimated_hours)}",
            "cannot start" if plan.is_all_warmup else plan.directory.state()[0],
        )
    said = [Costs(cluster).in_words(plans)]
    if len(plans) > MOST_ROWS:
        said.append(f"the first {MOST_ROWS} are shown")
    of = f"in {{}} of {len(plans)} runs"
    if unseen := [plan for plan in plans if plan.audio_seconds_seen < plan.hours * 3600]:
        said.append(f"not all of the data is seen {of.format(len(unseen))}: raise train.budget")
    # Where compute is what cells share, their steps differ: the ends of the range say little about size.
    short = [plan for plan in plans if plan.steps < FEWEST_WARMUPS * plan.config.train.optimiser.warmup_steps]
    short = [plan for plan in short if not plan.is_all_warmup]
    exhausted = [plan for plan in plans if plan.audio_seconds_seen > MOST_PASSES * plan.hours * 3600]
    for cells, what in (
        (short, f"fewer steps than {FEWEST_WARMUPS} warm-ups, so mostly warm-up,"),
        (exhausted, f"more than {MOST_PASSES} passes over the data"),
    ):
        if cells and not plans[0].config.train.test:
            said.append(f"{what} {of.format(len(cells))}: {_names(cells)}")
    if told := why_none_can_start(plans):
        said.append(told)
    table.caption = "; ".join(said)
    table.caption_justify = "left"
    return table


def _other_axes(plans: Sequence[RunPlan]) -> list[str]:
    """The axes that no column of the table shows, and in which runs differ."""

    def is_shown(axis: str) -> bool:
        return axis in ("model", "seed", "data.hours") or axis.startswith("train.budget.")

    axes = dict.fromkeys(axis for plan in plans for axis in plan.axes if not is_shown(axis))
    return [axis for axis in axes if len({repr(plan.axes.get(axis)) for plan in plans}) > 1]


def why_none_can_start(plans: Sequence[RunPlan]) -> str:
    """Which of the runs could train nothing, and what to do; "" if all can start."""
    futile = [plan for plan in plans if plan.is_all_warmup]
    if not futile:
        return ""
    names = [
        f"{plan.run_id} ({plan.steps:,} steps, warm-up of {plan.config.train.optimiser.warmup_steps:,})"
        for plan in futile
    ]
    rules = dict.fromkeys(
        _rule({axis: value for axis, value in plan.axes.items() if axis != "seed"}) for plan in futile
    )
    return (
        f"the warm-up is as long as the whole run of {_first(names)}: lower train.optimiser.warmup_steps, raise "
        f"train.budget, or add {_first(list(rules))} to sweep.exclude"
    )


def _rule(values: Cell) -> str:
    """As sweep.exclude takes it."""
    return "{" + ", ".join(f"{axis}: {value}" for axis, value in values.items()) + "}"


def _refuse_overridden_axes(sweep: SweepConfig, words: Sequence[str]) -> None:
    for word in words:
        key, _, value = word.partition("=")
        key = key.lstrip("+~")
        if key in sweep.axis_names:
            values = value if value.startswith("[") else f"[{value}]"
            raise UserError(f"{word}: {key} is an axis of sweep {sweep.name}: set sweep.axes.{key}={values} instead")
        group = key.split(".")[0]
        if group == "model" and group in sweep.axis_names:
            raise UserError(
                f"{word}: would give every size of sweep {sweep.name} the same {key}: "
                f"make a size of its own in conf/model, or, for it at sizes of your choice, write "
                f"'sweep.axes={{model: [...], {key}: [{value}]}}'"
            )


def _open_once(data: DataConfig, indices: dict[str, ShardIndex]) -> ShardIndex:
    if data.shards not in indices:
        indices[data.shards] = open_shards(data)
    return indices[data.shards]


def _names(plans: Sequence[RunPlan]) -> str:
    """Sizes with their steps, seeds told once."""
    return _first(list(dict.fromkeys(f"{plan.config.model.name} ({plan.steps:,} steps)" for plan in plans)))


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


def _with_unit(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
