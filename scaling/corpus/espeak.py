"""Speech from the espeak-ng library that the `espeakng-loader` wheel carries.

One function: `speak(voice, text)` → samples at 22.05 kHz, and the result depends on nothing else.
espeak-ng keeps its state in static variables that no call resets (the phase of the voicing, the
flutter, the echo buffer), so the same sentence comes out differently the second time.
Each call therefore maps a fresh image of the library, seeds it, speaks once and unmaps it;
this takes about 5 ms, and speech still comes several hundred times faster than real time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaling.errors import UserError

SAMPLE_RATE = 22050  # Hz, fixed by espeak-ng's phoneme data

INSTALL = "pip install espeakng-loader"

# espeak-ng copies the data path into a buffer of 160 bytes and cuts it off without a word;
# file names below it ("voices/!v/...") need the rest.
LONGEST_DATA_PATH = 100  # bytes

# From espeak-ng's speak_lib.h.
_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8, _END_PAUSE = 1, 0x1000
_RATE, _VOLUME, _PITCH, _RANGE, _PUNCTUATION, _CAPITALS, _WORD_GAP = 1, 2, 3, 4, 5, 6, 7
_VOLUME_WITHOUT_CLIPPING = 50  # percent; at the default of 100 the loud variants clip inside espeak

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Voice:
    """A speaker: an accent of English, a timbre, and a manner of speaking."""

    accent: str  # espeak language, such as "en-us" or "en-gb-x-rp"
    variant: str  # espeak voice variant, such as "f3": formants, breath, pitch of the voice
    pitch: int = 50  # 0 to 99; 50 leaves the variant's own pitch
    words_per_minute: int = 165
    pitch_range: int = 50  # 0 is monotone, 99 lively

    @property
    def name(self) -> str:
        return f"{self.accent}+{self.variant}"


def speak(voice: Voice, text: str) -> np.ndarray:
    """Speak a text: float32 (num_samples,), mono at `SAMPLE_RATE`, full scale ±1.

    A function of its arguments alone, in whatever process and order it is called.
    UserError if espeakng-loader is not installed, too old, or its data cannot be found;
    ValueError if there is no such voice.
    """
    library_path, data_path = library_and_data()
    chunks: list[np.ndarray] = []

    @_Callback
    def keep(samples: Any, num_samples: int, events: int | None) -> int:
        if samples and num_samples > 0:
            chunks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        return 0

    with _short_path(data_path) as short_data_path, _fresh_image(library_path) as library:
        if library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, os.fsencode(short_data_path), _INITIALIZE_DONT_EXIT) < 0:
            raise UserError(f"espeak-ng finds no voices in {data_path}: reinstall them with {INSTALL}")
        library.espeak_SetSynthCallback(keep)
        if library.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice.name!r}: see voices/!v and lang/ in {data_path}")
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        for parameter, value in (
            (_RATE, voice.words_per_minute),
            (_VOLUME, _VOLUME_WITHOUT_CLIPPING),
            (_PITCH, voice.pitch),
            (_RANGE, voice.pitch_range),
            (_PUNCTUATION, 0),
            (_CAPITALS, 0),
            (_WORD_GAP, 0),
        ):
            library.espeak_SetParameter(parameter, value, 0)
        encoded = text.encode()
        size = ctypes.c_size_t(len(encoded) + 1)
        status = library.espeak_Synth(ctypes.c_char_p(encoded), size, 0, 0, 0, _CHARS_UTF8 | _END_PAUSE, None, None)
        library.espeak_Terminate()
    if status != 0 or not chunks:
        raise RuntimeError(f"espeak-ng status {status}, {len(chunks)} blocks of samples, for {voice} and {text!r}")
    return (np.concatenate(chunks) / 32768).astype(np.float32)


def library_and_data() -> tuple[Path, Path]:
    """Where espeak-ng's library and voices are; UserError with the remedy if they are not installed."""
    try:
        import espeakng_loader
    except ImportError:
        raise UserError(f"the demo corpus is spoken by espeak-ng, which is not installed: {INSTALL}") from None
    try:
        library_path, data_path = Path(espeakng_loader.get_library_path()), Path(espeakng_loader.get_data_path())
    except RuntimeError as error:
        raise UserError(f"espeakng-loader is incomplete ({error}): {INSTALL} --force-reinstall") from None
    for path in (library_path, data_path):
        if not path.exists():
            raise UserError(f"espeakng-loader is incomplete, there is no {path}: {INSTALL} --force-reinstall")
    return library_path, data_path


@contextlib.contextmanager
def _short_path(path: Path) -> Iterator[str]:
    """The path itself, or a link to it in the temporary folder if espeak-ng would cut it off."""
    if len(os.fsencode(path)) <= LONGEST_DATA_PATH:
        yield str(path)
        return
    with tempfile.TemporaryDirectory(prefix="espeak-") as folder:
        link = os.path.join(folder, "data")
        if len(os.fsencode(link)) > LONGEST_DATA_PATH:
            raise UserError(
                f"espeak-ng takes paths of at most {LONGEST_DATA_PATH} bytes; its data is at {path}, and the "
                f"temporary folder {tempfile.gettempdir()} is too long for a link: set TMPDIR to a short path"
            )
        os.symlink(path, link)
        yield link


@contextlib.contextmanager
def _fresh_image(library_path: Path) -> Iterator[ctypes.CDLL]:
    """Map the library anew and unmap it at the end; RuntimeError if it was mapped already, with a used state."""
    if _is_mapped(library_path):
        raise RuntimeError(f"{library_path} is in use by another part of this process: its speech would not be ours")
    try:
        library = ctypes.CDLL(str(library_path))
    except OSError as error:
        raise UserError(f"espeak-ng cannot be loaded ({error}): {INSTALL} --force-reinstall") from None
    try:
        if not hasattr(library, "espeak_ng_SetRandSeed"):
            raise UserError(f"{library_path} is older than espeak-ng 1.52: {INSTALL} --upgrade")
        yield library
    finally:
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))


def _is_mapped(library_path: Path) -> bool:
    try:
        probe = ctypes.CDLL(str(library_path), mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    ctypes.CDLL(None).dlclose(ctypes.c_void_p(probe._handle))
    return True
