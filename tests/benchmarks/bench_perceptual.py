"""The differentiable PESQ beside the reference, over noisy speech and what trained models make of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from pesq import pesq
from scipy.stats import spearmanr

from bsrnn.perceptual import PerceptualModel
from scaling.evaluate import load_model
from scaling.records import RunDirectory
from scaling.scoring import Utterance, enhance_clips
from scaling.shards import SAMPLE_RATE, ShardIndex
from tests.benchmarks.page import DOCS, measured_on, write_block

RECIPES = DOCS / "recipes.md"
COMMAND = "python -m pytest tests/benchmarks/bench_perceptual.py -o python_files='bench_*.py'"
STEPS = (25, 100, 400)


def mean_pesq(scores: list[tuple[float, float]]) -> float:
    """By the reference."""
    return float(np.mean(scores, axis=0)[0])


def test_it_orders_what_trained_models_make_of_noisy_speech_as_pesq_does(tmp_path: Path):
    """Size xxt by the demo's recipe at three lengths of training, on the demo's test set."""
    torch.set_num_threads(1)
    shards = tmp_path / "shards"
    settings = [
        "+sweep=sizes",
        "sweep.axes.model=[xxt]",
        f"sweep.axes.train.budget.steps={[*STEPS]}",
        f"study={tmp_path / 'study'}",
        f"data.root={tmp_path / 'corpus'}",
        f"data.shards={shards}",
        "execution.threads=1",
    ]
    subprocess.run([sys.executable, "-m", "launch.sweep", *settings], check=True, cwd=Path(__file__).parents[2])
    index = ShardIndex.load(shards)
    clips = sorted(index.clips("test"), key=lambda clip: clip.id)
    perceptual = PerceptualModel()

    def judged(signal: np.ndarray, clean: np.ndarray) -> tuple[float, float]:
        """PESQ of a signal by the reference and by the differentiable model."""
        with torch.no_grad():
            mine = perceptual(torch.from_numpy(signal)[None], torch.from_numpy(clean)[None]).score.item()
        return pesq(SAMPLE_RATE, clean, signal, "wb"), mine

    unprocessed: list[tuple[float, float]] = []
    enhanced: dict[int, list[tuple[float, float]]] = {}
    for folder in sorted((tmp_path / "study" / "runs").iterdir()):
        plan, model = load_model(RunDirectory(folder))
        utterances: list[Utterance] = list(enhance_clips(model, index, clips))
        unprocessed = unprocessed or [judged(utterance.noisy, utterance.clean) for utterance in utterances]
        enhanced[plan.steps] = [judged(utterance.enhanced, utterance.clean) for utterance in utterances]
    assert tuple(sorted(enhanced)) == STEPS
    of_models = np.array([scores for steps in STEPS for scores in enhanced[steps]])
    together = np.concatenate([of_models, unprocessed])
    all_of_them, models_alone = (spearmanr(scores[:, 0], scores[:, 1]).statistic for scores in (together, of_models))
    lengths = ", ".join(map(str, STEPS))
    means = ", ".join(f"{mean_pesq(enhanced[num_steps]):.2f}" for num_steps in STEPS)
    difference = np.median(np.abs(together[:, 0] - together[:, 1]))
    write_block(
        RECIPES,
        "pesq of trained models",
        f"""Over the demo's {len(clips)} test utterances and what size xxt made of them after {lengths} steps of
`train=demo` (mean PESQ {mean_pesq(unprocessed):.2f}; {means}), {len(together)} signals, Spearman's correlation
of this model's score with that of `pesq` is {all_of_them:.4f}, and {models_alone:.4f} over the enhanced ones alone;
the median difference is {difference:.4f}.

`{COMMAND}`; {measured_on("pesq", "torch")}""",
    )
    assert min(all_of_them, models_alone) >= 0.95
