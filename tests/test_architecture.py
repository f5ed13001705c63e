"""The rooms' arrows: who may import whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# room: the project's modules that it may import beside its own
ARROWS = {"bsrnn": (), "scaling": ("bsrnn",), "launch": ("scaling",), "analysis": ("scaling.records",)}
# rooms that name every outside package they may use
OUTSIDE = {"bsrnn": {"torch", "numpy", "jaxtyping"}}
# and the commands among their modules that need more, with the modules that they alone use; none of the room's others
# imports one of these
COMMANDS: dict[str, set[str]] = {
    "bsrnn/audio.py": {"soundfile"},
    "bsrnn/pipes.py": set(),
    "bsrnn/enhance.py": {"soxr", "rich"},
    "bsrnn/onnx.py": {"onnx", "onnxruntime"},
    "bsrnn/rtf.py": {"onnxruntime"},
}
SHUN = {"analysis": {"torch", "accelerate", "hydra", "submitit"}}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_imports_only_where_its_arrows_point(room: str):
    assert modules_of(room)
    for path in modules_of(room):
        for name in imports_of(path):
            top = name.split(".")[0]
            if top in (*ARROWS, "tests", "conf") and top != room:
                allowed = ARROWS[room]
                assert any(name == a or name.startswith(f"{a}.") or a.startswith(f"{name}.") for a in allowed), (
                    f"{path.relative_to(ROOT)} imports {name}; {room} may import {allowed or 'none of the project'}"
                )
            needed = COMMANDS.get(str(path.relative_to(ROOT)), set())
            if room in OUTSIDE and top not in {room, *OUTSIDE[room], *needed, *sys.stdlib_module_names}:
                pytest.fail(f"{path.relative_to(ROOT)} imports {name}; {room} may use {sorted(OUTSIDE[room])}")
            assert top not in SHUN.get(room, set()), f"{path.relative_to(ROOT)} imports {name}"


def test_the_model_can_be_had_without_what_its_commands_need():
    commands = {path.removesuffix(".py").replace("/", ".") for path in COMMANDS}
    for path in modules_of("bsrnn"):
        if str(path.relative_to(ROOT)) not in COMMANDS:
            assert not imports_of(path) & commands, path.name


def test_records_use_the_standard_library_alone():
    tops = {name.split(".")[0] for name in imports_of(ROOT / "scaling" / "records.py")}
    assert tops <= set(sys.stdlib_module_names)


def test_the_analysis_installs_with_what_it_imports_and_without_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = {re.split(r"[\[<>=]", wanted)[0] for wanted in project["dependencies"]}
    used = {name.split(".")[0] for path in modules_of("analysis") for name in imports_of(path)}
    assert used - set(sys.stdlib_module_names) - {"analysis", "scaling"} == installed
    assert any(wanted.startswith("torch>") for wanted in project["optional-dependencies"]["train"])


def test_commands_that_look_after_runs_start_without_torch():
    """Seconds of each, on a login node that many share."""
    looked = "import sys, launch.status, launch.cancel, launch.logs; print(sorted({'torch', 'hydra'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", looked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_is_named_after_nothing():
    for room in ARROWS:
        assert not [path for path in modules_of(room) if path.stem in ("utils", "helpers", "common", "misc")]
