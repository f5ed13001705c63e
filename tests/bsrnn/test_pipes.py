"""Audio from a pipe and into one: raw samples and WAV, and nothing taken for what it is not."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from bsrnn.audio import Report
from bsrnn.enhance import main
from bsrnn.pipes import PipeFormat, pipe_blocks, read_pipe_header
from tests.bsrnn.sounds import music, wav


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_a_pipe_does_not_overwrite_the_file_it_comes_from(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    audio = tmp_path / "in.wav"
    soundfile.write(audio, music(4_000, 16_000, 1), 16_000)
    before = audio.read_bytes()
    with audio.open() as source, monkeypatch.context() as m:
        m.setattr(sys, "stdin", source)
        with pytest.raises(ValueError, match=r"in.wav is the input"):
            run(folder / "through.pt", "-", audio)
    assert audio.read_bytes() == before


def pipe(folder: Path, tmp_path: Path, *words: str, audio: bytes) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "bsrnn.enhance", str(folder / "through.pt"), *words]
    return subprocess.run(command, input=audio, capture_output=True, timeout=300, check=False, cwd=tmp_path)


def test_raw_samples_go_from_standard_input_to_standard_output(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    samples = np.rint(32_767 * music(24_000, 24_000, 2)).astype("<i2")
    (tmp_path / "in.raw").write_bytes(samples.tobytes())
    with (
        (tmp_path / "in.raw").open() as source,
        (tmp_path / "out.raw").open("w") as target,
        monkeypatch.context() as m,
    ):
        m.setattr(sys, "stdin", source)
        m.setattr(sys, "stdout", target)
        assert run(folder / "through.pt", "-", "-", "rate=24000", "channels=2") == 0
    enhanced = np.fromfile(tmp_path / "out.raw", "<i2").reshape(-1, 2)
    assert enhanced.shape == samples.shape
    assert np.abs(enhanced.astype(int) - samples)[2_000:-2_000].max() < 70


def test_a_wav_goes_through_a_pipe(folder: Path, tmp_path: Path):
    signal = music(20_000, 16_000, 1)
    done = pipe(folder, tmp_path, "-", "-", audio=wav(signal, "FLOAT"))
    assert done.returncode == 0, done.stderr
    (tmp_path / "out.wav").write_bytes(done.stdout)
    enhanced, rate = soundfile.read(tmp_path / "out.wav", dtype="float32")
    assert rate == 16_000
    np.testing.assert_allclose(enhanced, signal[:, 0], atol=1e-5)


@pytest.mark.parametrize("length", [None, b"\xff\xff\xff\xff", bytes(4)], ids=["told", "2^32 - 1", "0"])
def test_what_follows_the_samples_of_a_wav_in_a_pipe_is_no_audio(folder: Path, tmp_path: Path, length: bytes | None):
    whole = wav(music(8_000, 16_000, 1))
    if length is None:
        sent = whole + b"LIST" + struct.pack("<I", 5_000) + b"INFO" + bytes(range(1, 250)) * 20
    else:
        sent = whole[:40] + length + whole[44:]  # as tools write it into a pipe: all that comes is audio
    done = pipe(folder, tmp_path, "-", "out.wav", audio=sent)
    assert (done.returncode, done.stderr) == (0, b"")
    assert soundfile.info(tmp_path / "out.wav").frames == 8_000


def test_a_wav_in_a_pipe_that_ends_before_its_header_says_is_enhanced_as_far_as_it_goes_and_named(
    folder: Path, tmp_path: Path
):
    done = pipe(folder, tmp_path, "-", "out.wav", audio=wav(music(8_000, 16_000, 1))[: 44 + 2 * 5_000])
    assert done.returncode == 0
    assert done.stderr == (
        b"standard input: cut short: it holds 10000 of the 16000 bytes of samples that its header declares\n"
    )
    assert soundfile.info(tmp_path / "out.wav").frames == 5_000


def wav_start(kind: int, channels: int, rate: int, bits: int, rest: bytes = b"") -> bytes:
    form = struct.pack("<HHIIHH", kind, channels, rate, 0, 0, bits) + rest
    return b"RIFF1234WAVEfmt " + struct.pack("<I", len(form)) + form


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"RIFF1234WAVEfmt " + bytes(3), "ends in its header"),
        (wav_start(1, 1, 16_000, 24), "kind 1 with 24 bits"),
        (b"RIFF1234WAVEdata" + bytes(4), "before their format"),
        (b"RIFF1234WAVEfmt \4\0\0\0\1\0\1\0", "4 bytes of format; expected at least 16"),
        (wav_start(0xFFFE, 1, 16_000, 16), "16 bytes of format; expected at least 26"),
        (wav_start(1, 1, 4_000_000_000, 16), "declares 4000000000 Hz; expected 1 to 768000"),
        (wav_start(1, 0, 16_000, 16), "declares 0 channels; expected 1 to 1024"),
    ],
)
def test_a_wav_that_a_pipe_cannot_have_is_refused_by_name(start: bytes, said: str):
    with pytest.raises(ValueError, match=said):
        read_pipe_header(io.BytesIO(start), 16_000, {})


@pytest.mark.parametrize("given", [{"rate": 48_000}, {"channels": 2}])
def test_rate_and_channels_are_refused_for_a_wav_in_a_pipe(given: dict[str, int]):
    with pytest.raises(ValueError, match="leave out rate and channels"):
        read_pipe_header(io.BytesIO(wav(music(400, 16_000, 1))), 16_000, given)


@pytest.mark.parametrize("name", ["FLAC", "OGG", "RF64", "AIFF", "CAF", "AU", "MP3"])
def test_another_format_in_a_pipe_is_refused_and_not_taken_for_raw_samples(name: str, tmp_path: Path):
    soundfile.write(tmp_path / "audio", music(16_000, 16_000, 1), 16_000, format=name)
    start = (tmp_path / "audio").read_bytes()
    if name == "MP3":
        start = b"ID3\4\0\0\0\0\0\0" + start  # a tag, as players write it
    with pytest.raises(ValueError, match=f"(?i)begins like {name}; .* decode it to WAV"):
        read_pipe_header(io.BytesIO(start), 16_000, {})


@pytest.mark.parametrize("start", [b"RIFX1234WAVEfmt ", b"\0\0\0\x20ftypM4A ", b"RIFF1234AVI LIST"])
def test_a_container_that_is_no_wav_is_refused(start: bytes):
    with pytest.raises(ValueError, match=r"expected WAV.*: .*decode it to WAV"):
        read_pipe_header(io.BytesIO(start), 16_000, {})


@pytest.mark.parametrize("num_samples", [0, 1, 5, 6, 100])
def test_raw_samples_lose_nothing_to_the_look_at_their_beginning(num_samples: int):
    samples = np.arange(num_samples, dtype="<i2")
    source = io.BufferedReader(io.BytesIO(samples.tobytes()))  # type: ignore[arg-type]
    form, start, num_bytes = read_pipe_header(source, 16_000, {"rate": 8_000})
    assert (form, num_bytes) == (PipeFormat(8_000, 1), None)
    read = np.concatenate([np.zeros((0, 1)), *pipe_blocks(source, form, start, num_bytes, Report())])
    np.testing.assert_array_equal(read[:, 0] * 32_768, samples)
