"""The HTML report in a real browser, and the notebooks in a real kernel."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from analysis.report import main
from scaling.records import StudyDirectory
from tests.analysis.generated import grid_study

ROOT = Path(__file__).parents[2]
SCREENSHOT = ROOT / "build" / "report.png"  # kept, to be looked at
NOTEBOOKS = sorted((ROOT / "analysis" / "notebooks").glob("*.ipynb"))

# Clicks the first cell that comes from runs, and leaves what a reader would find in the document.
LOOK = """<script>addEventListener("load", () => {
  const cell = document.querySelector("td[data-runs]");
  cell.click();
  const images = [...document.images];
  const found = {
    tables: document.querySelectorAll("table").length,
    images: images.length,
    broken: images.filter((image) => !image.complete || image.naturalWidth < 200).length,
    panel: document.getElementById("runs").textContent,
    scrolled: [...document.querySelectorAll(".scroll")].filter((box) => box.scrollWidth > box.clientWidth).length,
    wide: document.documentElement.scrollWidth > document.documentElement.clientWidth,
  };
  document.documentElement.dataset.found = JSON.stringify(found);
});</script>"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyDirectory:
    study = grid_study(
        tmp_path_factory.mktemp("page") / "study", sizes=("c8", "xt", "t", "c48"), pmacs=(0.3, 1.0, 3.0), seeds=2
    )
    run = study.run(study.read_plan()[0]["run_id"])
    run.events.write_text('{"event": "failed", "failure": "out of memory", "reason": "at step 3", "time": 1.0}\n')
    return study


@pytest.fixture(scope="module")
def page(study: StudyDirectory) -> Path:
    assert main([f"study={study.path}", "bootstraps=100"]) == 0
    return study.report / "report.html"


def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        told = "needs a browser: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(told)
        pytest.skip(told)
    return found


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a file in a headless browser that can reach no network; its log is on standard error."""
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


def test_the_report_renders_in_a_browser_without_errors_and_its_screenshot_is_kept(page: Path, tmp_path: Path):
    SCREENSHOT.parent.mkdir(exist_ok=True)
    SCREENSHOT.unlink(missing_ok=True)
    shown = browse(page, tmp_path / "one", f"--screenshot={SCREENSHOT}", "--window-size=1200,9000", "--hide-scrollbars")
    assert shown.returncode == 0, shown.stderr
    assert "CONSOLE" not in shown.stderr
    assert SCREENSHOT.stat().st_size > 300_000
    looked = tmp_path / "looked.html"
    looked.write_text(page.read_text().replace("</body>", f"{LOOK}</body>"))
    dumped = browse(looked, tmp_path / "two", "--dump-dom", "--window-size=1280,900")
    assert "CONSOLE" not in dumped.stderr
    said = re.search(r'data-found="([^"]*)"', dumped.stdout)
    assert said is not None, dumped.stderr
    found = json.loads(said[1].replace("&quot;", '"'))
    assert found["images"] >= 6
    assert (found["broken"], found["wide"]) == (0, False)
    assert found["scrolled"] == 0, "a table is wider than a laptop's window"
    assert found["tables"] >= 10
    assert re.search(r"\d+ runs? behind", found["panel"])
    assert "seed" in found["panel"]


def test_the_report_is_one_file_that_asks_for_nothing(page: Path):
    text = page.read_text()
    for target in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert target.startswith(("data:", "#")), target
    assert "@import" not in text
    assert "url(" not in text


def test_the_report_says_what_passed_what_is_missing_and_where_it_comes_from(page: Path, study: StudyDirectory):
    text = page.read_text()
    assert re.search(r'class="verdict (pass|fail)">(PASS|FAIL): L\(N, D\) without the largest size \(c48\)', text)
    assert "1 planned runs have no result" in text
    assert "out of memory: at step 3" in text
    assert "6df9ffe" in text
    assert "hardware.cpu" in text
    registry = json.loads(re.search(r'id="registry">(.*?)</script>', text, re.S)[1])
    assert {run for ids in registry for run in ids} <= {row["run_id"] for row in study.read_plan()}
    assert max(int(number) for number in re.findall(r'data-runs="(\d+)"', text)) == len(registry) - 1


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_start_to_end_and_is_kept_without_output(notebook: Path, study: StudyDirectory):
    read = nbformat.read(notebook, as_version=4)
    for cell in read.cells:
        assert not cell.get("outputs"), f"{notebook.name}: clear its outputs before committing"
        assert cell.get("execution_count") is None
    environment = os.environ | {"STUDY": str(study.path), "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    client = NotebookClient(read, timeout=300, resources={"metadata": {"path": str(notebook.parent)}})
    client.execute(env=environment)
    shown = [output for cell in read.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 2
    assert not any(output["output_type"] == "error" for output in shown)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_without_its_study_stops_at_the_first_cell_with_one_line(notebook: Path, tmp_path: Path):
    read = nbformat.read(notebook, as_version=4)
    environment = os.environ | {"STUDY": str(tmp_path / "nowhere"), "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    client = NotebookClient(read, timeout=300, resources={"metadata": {"path": str(notebook.parent)}})
    with pytest.raises(CellExecutionError):
        client.execute(env=environment)
    code = [cell for cell in read.cells if cell.cell_type == "code"]
    assert [cell.get("execution_count") for cell in code] == [1] + [None] * (len(code) - 1)
    (error,) = [output for output in code[0].outputs if output["output_type"] == "error"]
    assert (error["ename"], error["evalue"].count("\n")) == ("SystemExit", 0)
    assert error["evalue"].startswith(f"no study at {tmp_path / 'nowhere'}: no plan.jsonl; set STUDY")
