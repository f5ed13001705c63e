"""The documents say what the code does."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from launch.config import StudyConfig
from scaling.cli import CONFIG_FOLDER, all_keys
from scaling.evaluate import EvaluateConfig

ROOT = Path(__file__).parents[1]


def test_every_setting_is_listed_and_every_listed_setting_exists():
    listed = set(re.findall(r"`([a-z_.]+)`", (ROOT / "docs" / "configuration.md").read_text()))
    keys = set(all_keys(StudyConfig)) | set(all_keys(EvaluateConfig))
    leaves = {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
    assert leaves - listed == set()
    dotted = {key for key in listed if key.split(".")[0] in ("model", "data", "train", "execution", "sweep", "cluster")}
    assert dotted - keys == set()


@pytest.mark.parametrize("group", ["model", "data", "train", "deepspeed", "cluster", "sweep"])
def test_every_choice_is_listed(group: str):
    text = (ROOT / "docs" / "configuration.md").read_text()
    (line,) = [line for line in text.splitlines() if f"`conf/{group}`" in line and line.startswith("|")]
    words = ["git", "ls-files", "--others", "--", f"conf/{group}"]
    own = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()  # of a site
    for path in (CONFIG_FOLDER / group).glob("*.yaml"):
        assert re.search(rf"\b{path.stem}\b", line) or str(path.relative_to(ROOT)) in own, path


@pytest.mark.parametrize(
    "document",
    ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))],
)
def test_every_file_a_document_names_is_there(document: str):
    text = (ROOT / document).read_text()
    names = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    names += re.findall(r"`((?:bsrnn|scaling|launch|analysis|conf|tests|docs)/[a-z_/]+\.(?:py|md|yaml))`", text)
    for name in names:
        assert ((ROOT / document).parent / name).exists() or (ROOT / name).exists(), name
