"""From a command line to a checked configuration, and from what is wrong in it to one line.

The commands take Hydra's override grammar (`model=xt train.global_batch=16 +sweep=sizes`) and
compose conf/ through Hydra's compose interface rather than its `main` decorator: that
one makes output folders, takes over logging, and answers a user's mistake with a traceback.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from scaling.errors import UserError, first_line

CONFIG_FOLDER = Path(__file__).parent.parent / "conf"

Config = TypeVar("Config")

# Settings that name a place, which may be called whatever a file system allows.
PLACES = {"study", "run", "shards", "data.root", "data.shards", "data.cache", "noisy", "clean", "enhanced", "scores"}

BOTH_AXES = "an axis and one of its own settings cannot both be axes; write 'sweep.axes={{{}: [...], {}: {}}}'"


@lru_cache
def is_group(key: str) -> bool:
    """Whether a key is a choice between files (`model`) rather than a setting."""
    return (CONFIG_FOLDER / key).is_dir()


def load_config(schema: type[Config], name: str, overrides: Sequence[str]) -> Config:
    """conf/NAME.yaml with overrides, as an object of `schema`; UserError on whatever a user got wrong."""
    return to_object(schema, compose_config(schema, name, overrides))


def compose_config(schema: type, name: str, overrides: Sequence[str]) -> DictConfig:
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            return compose(name, [_quoted_place(word) for word in overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, schema, overrides)) from None
    except ValueError as error:  # Hydra's own, for model=null or a nameless key
        if told := _axis_with_parts(overrides):
            raise UserError(told) from None
        raise UserError(f"{' '.join(overrides)}: not understood ({first_line(error)})") from None
    except AssertionError:  # OmegaConf's answer to data.demo.hours=1 where data.demo is null
        dotted = " ".join(word for word in overrides if "." in word.split("=")[0])
        raise UserError(f"{dotted}: one of these settings has a parent that is null; leave it out") from None


def _quoted_place(word: str) -> str:
    """A place as Hydra's grammar takes it, ~ expanded, which a shell leaves to us behind a dotted key."""
    key, _, value = word.partition("=")
    if key.lstrip("+") not in PLACES or value in ("", "null") or value[0] in "'\"" or "${" in value:
        return word
    place = os.path.expanduser(value)
    if re.fullmatch(r"[\w./:%+@-]+", place, re.ASCII):
        return f"{key}={place}"
    escaped = place.replace("'", "\\'")
    return f"{key}='{escaped}'"


def with_values(config: DictConfig, values: Mapping[str, Any], schema: type) -> DictConfig:
    """A copy of a composed configuration with settings (dotted key -> value) set; UserError as in `load_config`."""
    copied = copy.deepcopy(config)
    for key, value in values.items():
        set_value(copied, key, value, schema)
    return copied


def set_value(config: DictConfig, key: str, value: Any, schema: type) -> None:
    """Set a setting (dotted key) of a composed configuration in place; UserError as in `load_config`."""
    try:
        OmegaConf.update(config, key, value)
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, schema, ())) from None
    except AssertionError:
        raise UserError(f"{key}: sets a part of something that is null here; leave it out") from None


def get_value(config: DictConfig, key: str, schema: type) -> Any:
    """A setting (dotted key) of a composed configuration, before its checks; UserError as in `load_config`."""
    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, schema, ())) from None


def to_object(schema: type[Config], config: DictConfig | dict[str, Any], is_checked: bool = False) -> Config:
    """A composed or stored configuration as an object of `schema`, its checks made.

    is_checked: it was composed by `schema` and holds no key beside; comparing again is half of the time
    """
    try:
        # as plain data, because a composed configuration lets any key in that came with a plus
        plain = OmegaConf.to_container(config) if isinstance(config, DictConfig) else config
        typed = config if is_checked else OmegaConf.merge(OmegaConf.structured(schema), plain)
        result = OmegaConf.to_object(typed)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or str(error).rsplit(" ", 1)[-1]
        raise UserError(f"{key} is not set: give {key}=VALUE") from None
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, schema, ())) from None
    except ValueError as error:  # from the checks of a class that knows nothing of users' errors
        raise UserError(str(error)) from None
    assert isinstance(result, schema)
    return result


# --- what a user got wrong, in one line ----------------------------------------------------


def _explain(error: Exception, schema: type, overrides: Sequence[str]) -> str:
    if isinstance(error, MissingConfigException):
        return _unknown_choice(error, overrides)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not understood as KEY=VALUE ({first_line(error)})"
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) and error.__cause__ else error
    key = getattr(cause, "full_key", None) or getattr(cause, "key", None)
    if isinstance(cause, (ConfigKeyError, AttributeError)) and key:
        return f"{key}: no such setting{_did_you_mean(str(key), all_keys(schema))}"
    if key and "Cannot merge DictConfig with ListConfig" in str(cause):
        return _axis_with_parts(overrides) or f"{key}: {BOTH_AXES.format('model', 'model.norm', '[...]')}"
    if key and "is not a ListConfig" in str(cause):
        return f"{key}: expected a list, {key}=[...]"
    if key:
        return f"{key}: {first_line(cause)}"
    return first_line(error)


def _axis_with_parts(overrides: Sequence[str]) -> str:
    """What is wrong with an axis below one that the sweep may have: sweep.axes.model.norm; "" if there is none."""
    for word in overrides:
        key, _, value = word.lstrip("+").partition("=")
        axis = key.removeprefix("sweep.axes.")
        group = axis.partition(".")[0]
        if axis != key and axis != group and is_group(group):
            return f"sweep.axes.{group}: {BOTH_AXES.format(group, axis, value)}"
    return ""


def _unknown_choice(error: MissingConfigException, overrides: Sequence[str]) -> str:
    wanted = str(error.missing_cfg_file or "")
    group, _, choice = wanted.rpartition("/")
    folder = CONFIG_FOLDER / group
    if group and folder.is_dir():
        choices = sorted(path.stem for path in folder.glob("*.yaml"))
        return f"{group}={choice}: no such {group}; expected one of {', '.join(choices)} (the files of conf/{group})"
    groups = sorted(path.name for path in CONFIG_FOLDER.iterdir() if path.is_dir())
    said = next((word for word in overrides if word.lstrip("+~").split("=")[0] == group), wanted)
    return f"{said}: no such choice; expected one of {', '.join(groups)}{_did_you_mean(group, groups)}"


def all_keys(schema: type, prefix: str = "") -> list[str]:
    """Every setting of a tree of dataclasses, dotted."""
    keys = []
    for name, hint in get_type_hints(schema).items():
        keys.append(f"{prefix}{name}")
        if get_origin(hint) is list:  # its entries have no key of their own
            continue
        for choice in (hint, *get_args(hint)):  # X and the X of X | None
            if is_dataclass(choice) and isinstance(choice, type):
                keys += all_keys(choice, f"{prefix}{name}.")
    return keys


def _did_you_mean(key: str, known: Sequence[str]) -> str:
    """The settings whose own name is like the key's, else those whose whole path is."""
    leaves: dict[str, list[str]] = {}
    for name in known:
        leaves.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    close = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(leaves), n=2, cutoff=0.7)
    names = [name for leaf in close for name in leaves[leaf]] or difflib.get_close_matches(key, known, n=2)
    names = sorted(names, key=lambda name: name.count("."))  # the nearer to the top first
    return (
        f"; did you mean {' or '.join(names[:3])}?" if names else "; the settings are listed in docs/configuration.md"
    )
