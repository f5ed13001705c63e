"""Files, folders and pipes come out enhanced, in their own rate, channels, length and format, and never lost."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch

from bsrnn import BSRNN, BSRNNConfig
from bsrnn.audio import Report
from bsrnn.enhance import Enhancer, enhance_blocks, main
from bsrnn.folding import fold
from bsrnn.modelfile import load_model, save_model
from tests.bsrnn.sounds import music, passing_through, wav
from tests.bsrnn.test_model import trained_like


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_a_file_is_enhanced_as_the_model_enhances_the_whole_signal(folder: Path, tmp_path: Path):
    signal = music(256 * 60 - 1, 16_000, 1)
    soundfile.write(tmp_path / "in.wav", signal, 16_000, subtype="FLOAT")
    assert run(folder, tmp_path / "in.wav", tmp_path / "out.wav") == 0  # the folder stands for a run's directory
    enhanced, rate = soundfile.read(tmp_path / "out.wav", dtype="float32")
    with torch.inference_mode():
        expected = load_model(folder / "model.pt")(torch.from_numpy(signal.T)).waveform[0].numpy()
    assert rate == 16_000
    assert soundfile.info(tmp_path / "out.wav").subtype == "FLOAT"
    assert np.abs(enhanced - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("sample_rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("num_channels", [1, 2, 3])
def test_any_rate_and_number_of_channels_come_back_as_they_were(
    folder: Path, tmp_path: Path, sample_rate: int, num_channels: int
):
    num_samples = sample_rate + 17
    signal = music(num_samples, sample_rate, num_channels)
    soundfile.write(tmp_path / "in.flac", signal, sample_rate)
    assert run(folder / "through.pt", tmp_path / "in.flac", tmp_path / "out.flac") == 0
    enhanced, rate = soundfile.read(tmp_path / "out.flac", dtype="float32", always_2d=True)
    assert (rate, enhanced.shape) == (sample_rate, signal.shape)
    inner = slice(sample_rate // 20, -sample_rate // 20)  # a resampler has no past and future at the edges
    assert np.abs(enhanced - signal)[inner].max() < 2e-3
    assert np.abs(enhanced - signal).max() < 0.2


def test_channels_are_enhanced_each_by_itself_after_resampling(folder: Path, tmp_path: Path):
    signal = music(48_000, 48_000, 2)
    soundfile.write(tmp_path / "in.wav", signal, 48_000, subtype="FLOAT")
    run(folder / "model.pt", tmp_path / "in.wav", tmp_path / "out.wav")
    enhanced, _ = soundfile.read(tmp_path / "out.wav", dtype="float32")
    at_model_rate = np.pad(soxr.resample(signal, 48_000, 16_000, "VHQ"), ((0, 256), (0, 0)))
    with torch.inference_mode():
        whole = load_model(folder / "model.pt")(torch.from_numpy(np.ascontiguousarray(at_model_rate.T))).waveform
    expected = soxr.resample(whole.numpy().T, 16_000, 48_000, "VHQ")[:48_000]
    assert np.abs(enhanced - expected)[:-100].max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("norm", "causal"), [("group", True), ("batch", False)])
def test_a_model_that_does_not_stream_enhances_each_recording_whole(tmp_path: Path, norm: str, causal: bool):
    model = trained_like(BSRNNConfig(16, 1, norm=norm, causal=causal))
    save_model(model, tmp_path / "model.pt")
    signal = music(5 * 16_000 + 7, 16_000, 2)  # more than a block
    soundfile.write(tmp_path / "in.wav", signal, 16_000, subtype="FLOAT")
    assert run(tmp_path / "model.pt", tmp_path / "in.wav", tmp_path / "out.wav") == 0
    enhanced, _ = soundfile.read(tmp_path / "out.wav", dtype="float32")
    with torch.inference_mode():
        expected = model(torch.from_numpy(np.ascontiguousarray(signal.T))).waveform.numpy().T
    assert enhanced.shape == signal.shape
    assert np.abs(enhanced - expected).max() <= 1e-5 * np.abs(expected).max()
    soundfile.write(tmp_path / "high.wav", signal, 44_100)
    assert run(tmp_path / "model.pt", tmp_path / "high.wav", tmp_path / "out.wav") == 0
    enhanced, rate = soundfile.read(tmp_path / "out.wav")
    assert (rate, enhanced.shape) == (44_100, signal.shape)
    assert np.abs(enhanced[-10_000:]).max() > 0.01  # to the end


@pytest.mark.parametrize("num_samples", [0, 1, 100, 256, 257, 511])
def test_the_shortest_files_keep_their_length_and_stay_finite(folder: Path, tmp_path: Path, num_samples: int):
    soundfile.write(tmp_path / "in.wav", music(num_samples, 16_000, 1), 16_000, subtype="FLOAT")
    assert run(folder / "model.pt", tmp_path / "in.wav", tmp_path / "out.wav") == 0
    enhanced, _ = soundfile.read(tmp_path / "out.wav")
    assert len(enhanced) == num_samples
    assert np.isfinite(enhanced).all()
    assert np.abs(enhanced).max(initial=0) < 1  # no blow-up where a window ends


def test_a_folders_tree_is_mirrored_and_what_cannot_be_read_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    noisy = tmp_path / "noisy"
    for name in ("a.wav", "deep/er/b.flac"):
        (noisy / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(noisy / name, music(4_000, 16_000, 1), 16_000)
    (noisy / "notes.txt").write_text("not audio")
    assert run(folder / "through.pt", noisy, tmp_path / "out") == 0
    assert "2 of 2 files enhanced" in capsys.readouterr().err
    (noisy / "deep" / "broken.wav").write_bytes(b"RIFF, but no more")
    assert run(folder / "through.pt", noisy, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert [line for line in said.splitlines() if "broken.wav" in line and line.startswith("error: ")]
    assert "2 of 3 files enhanced" in said
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert written == ["a.wav", "deep/er/b.flac"]


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_files_of_a_folder_come_out_as_alone_from_a_model_that_is_made_ready_once(
    tmp_path: Path, norm: str, monkeypatch: pytest.MonkeyPatch
):
    """Whatever their rates and channels, and though one breaks off in its midst."""
    save_model(trained_like(BSRNNConfig(16, 1, norm=norm)), tmp_path / "model.pt")
    (tmp_path / "noisy").mkdir()
    forms = {"a": (16_000, 1), "c": (16_000, 2), "d": (48_000, 1), "e": (16_000, 1), "f": (16_000, 2)}
    for number, (name, (rate, num_channels)) in enumerate(forms.items()):
        signal = music(rate + 100 * number, rate, num_channels)
        soundfile.write(tmp_path / "noisy" / f"{name}.wav", signal, rate, subtype="FLOAT")
    soundfile.write(tmp_path / "noisy" / "b.flac", np.random.default_rng(0).uniform(-1, 1, 200_000), 16_000)
    damaged = bytearray((tmp_path / "noisy" / "b.flac").read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 20_000] = bytes(20_000)
    (tmp_path / "noisy" / "b.flac").write_bytes(damaged)
    for name in forms:
        run(tmp_path / "model.pt", tmp_path / "noisy" / f"{name}.wav", tmp_path / f"alone/{name}.wav")

    made = []
    monkeypatch.setattr("bsrnn.streaming.fold", lambda model: made.append(model) or fold(model))
    monkeypatch.setattr("bsrnn.enhance.fold", lambda model: made.append(model) or fold(model))
    assert run(tmp_path / "model.pt", tmp_path / "noisy", tmp_path / "together") == 1
    assert len(made) == (2 if norm == "batch" else 1)  # for one channel, and for two
    for name in forms:
        alone, together = (soundfile.read(tmp_path / way / f"{name}.wav")[0] for way in ("alone", "together"))
        assert np.array_equal(alone, together), name


def test_what_is_beyond_full_scale_is_clipped_and_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    signal = 15 * music(8_000, 16_000, 1)
    soundfile.write(tmp_path / "in.wav", signal, 16_000, subtype="FLOAT")
    run(folder / "through.pt", tmp_path / "in.wav", tmp_path / "whole.flac")
    beyond = int((np.abs(signal) > 1).sum())
    said = capsys.readouterr().err
    assert abs(int(said.split(": ")[1].split()[0]) - beyond) < 20
    clipped, _ = soundfile.read(tmp_path / "whole.flac")
    assert np.abs(clipped - np.clip(signal[:, 0], -1, 1)).max() < 1e-3
    run(folder / "through.pt", tmp_path / "in.wav", tmp_path / "float.wav")
    kept, _ = soundfile.read(tmp_path / "float.wav")
    assert np.abs(kept).max() > 3
    assert capsys.readouterr().err == ""


def test_samples_that_are_no_numbers_count_as_silence_and_do_no_harm_beyond(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    signal = music(8_000, 16_000, 1)
    signal[100], signal[101] = np.nan, np.inf
    soundfile.write(tmp_path / "in.wav", signal, 16_000, subtype="FLOAT")
    run(folder / "model.pt", tmp_path / "in.wav", tmp_path / "out.wav")
    assert "2 NaN or infinite samples" in capsys.readouterr().err
    assert np.isfinite(soundfile.read(tmp_path / "out.wav")[0]).all()


def test_a_wav_file_that_ends_before_its_header_says_is_enhanced_as_far_as_it_goes_and_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cut, unknown = tmp_path / "cut.wav", tmp_path / "unknown.wav"
    soundfile.write(cut, music(8_000, 16_000, 1), 16_000)
    whole = cut.read_bytes()
    cut.write_bytes(whole[: 44 + 2 * 5_000])
    unknown.write_bytes(whole[:40] + b"\xff" * 4 + whole[44:])  # as tools write it into a pipe
    run(folder / "model.pt", cut, tmp_path / "out.wav")
    assert "cut.wav: cut short: it holds 10000 of the 16000 bytes" in capsys.readouterr().err
    assert soundfile.info(tmp_path / "out.wav").frames == 5_000
    run(folder / "model.pt", unknown, tmp_path / "out.wav")
    assert capsys.readouterr().err == ""
    assert soundfile.info(tmp_path / "out.wav").frames == 8_000


@pytest.mark.parametrize(("sample_rate", "most_ms"), [(8_000, 207), (16_000, 32), (44_100, 170), (48_000, 147)])
def test_a_sample_is_held_back_as_long_as_the_documentation_says(sample_rate: int, most_ms: float):
    enhancer, block = Enhancer(BSRNN(BSRNNConfig(16, 1))), np.zeros((sample_rate // 1_000, 1), np.float32)
    num_in = num_out = longest = 0

    def blocks() -> Iterator[np.ndarray]:
        nonlocal num_in
        for _ in range(1_500):
            num_in += len(block)
            yield block

    for enhanced in enhance_blocks(enhancer, blocks(), sample_rate, 1, Report()):
        if num_out < 1_400 * len(block):  # before the end, where all that is left comes at once
            longest = max(longest, num_in - num_out)
        num_out += len(enhanced)
    assert 0.95 * most_ms < 1e3 * longest / sample_rate <= most_ms


def test_a_file_goes_into_a_folder_that_is_made_for_it(folder: Path, tmp_path: Path):
    soundfile.write(tmp_path / "in.wav", music(400, 16_000, 1), 16_000)
    assert run(folder / "model.pt", tmp_path / "in.wav", f"{tmp_path}/new/er/") == 0
    assert run(folder / "model.pt", tmp_path / "in.wav", tmp_path / "new") == 0
    assert soundfile.info(tmp_path / "new" / "er" / "in.wav").frames == 400
    assert soundfile.info(tmp_path / "new" / "in.wav").frames == 400


def test_an_opus_file_holds_opus_and_an_ogg_file_vorbis(folder: Path, tmp_path: Path):
    soundfile.write(tmp_path / "in.wav", music(4_800, 48_000, 1), 48_000)
    for name, subtype in (("out.opus", "OPUS"), ("out.ogg", "VORBIS")):
        assert run(folder / "model.pt", tmp_path / "in.wav", tmp_path / name) == 0
        assert soundfile.info(tmp_path / name).subtype == subtype


def test_a_folders_output_is_never_one_of_its_inputs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """noisy/noisy/a.wav into the folder above noisy would be noisy/a.wav."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noisy" / "noisy").mkdir(parents=True)
    for path in ("noisy/a.wav", "noisy/noisy/a.wav"):
        soundfile.write(path, music(3_000, 16_000, 1), 16_000)
    before = (tmp_path / "noisy" / "a.wav").read_bytes()
    assert run(folder, "noisy", ".") == 1
    assert "error: noisy/a.wav: noisy/a.wav would lie in the input noisy" in capsys.readouterr().err
    assert (tmp_path / "noisy" / "a.wav").read_bytes() == before
    assert (tmp_path / "a.wav").exists()


def test_links_to_folders_are_followed_once(folder: Path, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "elsewhere" / "a.wav", music(3_000, 16_000, 1), 16_000)
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "itself").symlink_to(tmp_path / "in")
    assert run(folder, tmp_path / "in", tmp_path / "out") == 0
    assert [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.wav")] == [
        "linked/a.wav"
    ]


def test_formats_in_which_one_cannot_seek_are_read(folder: Path, tmp_path: Path):
    soundfile.write(tmp_path / "in.wav", music(8_000, 8_000, 1), 8_000, subtype="GSM610")
    assert run(folder, tmp_path / "in.wav", tmp_path / "out.flac") == 0
    assert soundfile.info(tmp_path / "out.flac").frames == soundfile.info(tmp_path / "in.wav").frames


def test_a_wav_with_lengths_of_64_bits_stays_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So does one whose samples need them."""
    soundfile.write(tmp_path / "in.wav", music(3_000, 16_000, 1), 16_000, format="RF64", subtype="PCM_16")
    soundfile.write(tmp_path / "in.flac", music(3_000, 16_000, 1), 16_000)
    formats = []
    for name, most in (("in.wav", None), ("in.flac", None), ("in.flac", 5_999)):
        if most is not None:
            monkeypatch.setattr("bsrnn.audio.MOST_WAV_BYTES", most)
        assert run(folder, tmp_path / name, tmp_path / "out.wav") == 0
        found = soundfile.info(tmp_path / "out.wav")
        formats.append((found.format, found.frames))
    assert formats == [("RF64", 3_000), ("WAV", 3_000), ("RF64", 3_000)]


def test_a_wav_whose_recorder_was_cut_off_is_not_enhanced_to_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    soundfile.write(tmp_path / "in.wav", music(16_000, 16_000, 1), 16_000)
    content = bytearray((tmp_path / "in.wav").read_bytes())
    content[40:44] = bytes(4)  # how many bytes of samples there are
    (tmp_path / "in.wav").write_bytes(content)
    with pytest.raises(ValueError, match=r"declares no samples, .* but 32044 bytes are there: pipe it in"):
        run(folder, tmp_path / "in.wav", tmp_path / "out.wav")
    assert not (tmp_path / "out.wav").exists()


def test_an_input_is_never_overwritten(folder: Path, tmp_path: Path):
    audio = tmp_path / "in.wav"
    soundfile.write(audio, music(4_000, 16_000, 1), 16_000)
    (tmp_path / "link.wav").symlink_to(audio)
    before = audio.read_bytes()
    for target in (audio, tmp_path / "link.wav", tmp_path):
        with pytest.raises(ValueError, match=r"is the input"):
            run(folder / "model.pt", audio, target)
    with pytest.raises(ValueError, match="lies in the input"):
        run(folder / "model.pt", tmp_path, tmp_path / "deeper")
    assert audio.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{models}/model.pt", "none.wav", "out.wav"], "none.wav: no such file or folder"),
        (["none.pt", "{audio}", "out.wav"], "none.pt: no such file"),
        (["{empty}", "{audio}", "out.wav"], "a run writes its model there when its training ends"),
        (["{audio}", "{audio}", "out.wav"], "not a checkpoint that torch can read"),
        (["{models}/model.pt", "{audio}", "{empty}/out.xyz"], "no audio format is called .xyz"),
        (["{models}/model.pt", "{audio}"], "expected CHECKPOINT INPUT OUTPUT"),
        (["{models}/model.pt", "{audio}", "out.wav", "speed=3"], "speed=3: no such setting"),
        (["{models}/model.pt", "{audio}", "out.wav", "rate=8000"], "leave them out for files"),
        (["{models}/model.pt", "-", "-", "rate=4000000000"], "rate = 4000000000: expected from 1 to 768000"),
        (["{models}/model.pt", "-", "-", "channels=0"], "channels = 0: expected from 1 to 1024"),
        (["{models}/model.pt", "{empty}", "out"], "holds no audio files"),
        (["{models}/model.pt", "{audio}", "{audio}/out.wav"], "out.wav: cannot be written .*: choose another path"),
        (["{models}/model.pt", "{wide}", "{empty}/out.mp3"], "7 channels at 96000 Hz .* cannot be written as MP3"),
        (["{models}/model.pt", "{wide}", "{empty}/out.mp3"], "take .wav, which holds up to 1024 channels"),
        (["{models}/model.pt", "{wide}", "{empty}/out.opus"], "96000 Hz .* Opus only supports sample rates of 8000, "),
        (["{models}/model.pt", "{raw}", "{empty}/out.wav"], "in.raw: raw samples tell neither .*: pipe .* rate=HZ"),
        (
            ["{models}/model.pt", "{audio}", "{empty}/out"],
            "empty/out: not an existing folder, and without .*, or / for a",
        ),
        (["{models}/model.pt", "{audio}", "{empty}/../fifo.wav"], "fifo.wav exists and is not a regular file"),
        (["{models}/model.pt", "-", "{empty}/new/"], "new/ is a folder: give a file"),
        (["{models}/model.pt", "{wide}.none", "{empty}/out.wav"], "no such file or folder"),
        (["{models}/strange.pt", "{audio}", "out.wav"], "strange.pt: it is not a valid BSRNN configuration"),
        (["{models}/objects.pt", "{audio}", "out.wav"], "objects.pt holds more than plain data"),
    ],
)
def test_a_users_mistake_is_one_line(folder: Path, tmp_path: Path, words: list[str], said: str):
    soundfile.write(tmp_path / "in.wav", music(400, 16_000, 1), 16_000)
    (tmp_path / "empty").mkdir()
    soundfile.write(tmp_path / "wide.wav", music(960, 96_000, 7), 96_000)
    torch.save({"format": "bsrnn", "config": {"num_channels": 0}, "state": {}}, folder / "strange.pt")
    torch.save({"format": "bsrnn", "model": passing_through()}, folder / "objects.pt")
    (tmp_path / "in.raw").write_bytes(bytes(100))
    os.mkfifo(tmp_path / "fifo.wav")
    places = {"models": folder, "empty": tmp_path / "empty", "raw": tmp_path / "in.raw"}
    places |= {"audio": tmp_path / "in.wav", "wide": tmp_path / "wide.wav"}
    with pytest.raises((ValueError, OSError), match=said) as error:
        run(*(word.format(**places) for word in words))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "empty").iterdir())  # nothing half written


def test_a_file_whose_header_tells_of_an_impossible_rate_is_refused_by_name(folder: Path, tmp_path: Path):
    whole = wav(music(400, 16_000, 1))
    (tmp_path / "in.wav").write_bytes(whole[:24] + struct.pack("<I", 2_000_000_000) + whole[28:])
    with pytest.raises(ValueError, match=r"in.wav: its header declares 2000000000 Hz; expected 1 to 768000"):
        run(folder / "model.pt", tmp_path / "in.wav", tmp_path / "out.wav")
