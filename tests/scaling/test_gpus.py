"""Which GPUs there are, by the environment and the driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaling import gpus
from scaling.gpus import model_of, visible_gpus
from tests.launch.stand_ins import stand_in


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("", []),
        ("-1", []),
        ("0,1", ["0", "1"]),
        ("3, 1", ["3", "1"]),
        ("1,-1,2", ["1"]),  # CUDA reads no further
        ("GPU-8932f937,MIG-1a2b", ["GPU-8932f937", "MIG-1a2b"]),
    ],
)
def test_the_gpus_that_the_environment_names_are_taken_as_they_are(
    monkeypatch: pytest.MonkeyPatch, named: str, expected: list[str]
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("GPU 0: A100 (UUID: GPU-1)\nGPU 1: A100 (UUID: GPU-2)\n", ["0", "1"]),
        (
            "GPU 0: A100 (UUID: GPU-1)\n  MIG 1g.10gb Device 0: (UUID: MIG-1)\n  MIG 1g.10gb Device 1: (UUID: M)\n",
            ["0"],
        ),
        ("No devices found.\n", []),
    ],
)
def test_the_drivers_list_counts_its_gpus_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, expected: list[str]
):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{said}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == expected


def test_without_the_drivers_tool_its_folder_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(gpus, "DRIVERS_GPUS", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == ["0", "1"]


@pytest.mark.parametrize(
    ("named", "model"),
    [
        (["0"], "A100 80GB"),
        (["0", "GPU-2"], "A100 80GB and T4"),
        (["2"], None),  # cut into parts
        (["MIG-3a"], None),
        (["7"], None),
        ([], None),
    ],
)
def test_a_gpus_model_is_the_drivers_word_and_a_part_of_one_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: list[str], model: str | None
):
    stand_in(
        tmp_path,
        {
            "nvidia-smi": """[ "$1" = --query-gpu=index,uuid,name,mig.mode.current ] && /bin/cat <<'END'
0, GPU-1a, A100 80GB, Disabled
1, GPU-2b, T4, [N/A]
2, GPU-3c, H100, Enabled
END"""
        },
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert model_of(named) == model
    (tmp_path / "nvidia-smi").unlink()
    assert model_of(named) is None
