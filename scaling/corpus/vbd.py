"""VoiceBank+DEMAND (VBD, https://doi.org/10.7488/ds/2117) as a user has it on disk.

A user's folder holds, for the training and the test set, clean and noisy wavs under the
same names, each either unzipped or in the zip as downloaded:

    clean_trainset_28spk_wav/p226_001.wav     or  clean_trainset_28spk_wav.zip
    noisy_trainset_28spk_wav/p226_001.wav     or  noisy_trainset_28spk_wav.zip
    clean_testset_wav/p232_001.wav            or  clean_testset_wav.zip
    noisy_testset_wav/p232_001.wav            or  noisy_testset_wav.zip
    log_trainset_28spk.txt, log_testset.txt   here, in logfiles/, in logfiles.zip, or nowhere

`find_utterances` lists what is there without reading a sample: which rates are allowed, and
whether the files are sound, is for `scaling.prepare` to say. By the field's habit two
training speakers are held out for validation; the test set chooses nothing.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bsrnn.audio import walked
from scaling.corpus.wav import WavSource, close_zips, open_zip
from scaling.errors import UserError

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
VALIDATION_SPEAKERS = ("p226", "p287")

# A set of the corpus: its clean folder, its noisy folder, its log of noises and SNRs.
TRAINSET = ("clean_trainset_28spk_wav", "noisy_trainset_28spk_wav", "log_trainset_28spk.txt")
TESTSET = ("clean_testset_wav", "noisy_testset_wav", "log_testset.txt")

# Second-hand figures: a mismatch is worth a warning, not a refusal.
KNOWN_MD5 = {
    "clean_trainset_28spk_wav.zip": "d2d5a45ec32f8fcbf201bde0447e20ba",
    "clean_testset_wav.zip": "34eb1c0ba7ef667e9b966866c542fc16",
    "noisy_testset_wav.zip": "fb1b86caa31e8ba5b506c0c64da9aab5",
}

Conditions = dict[str, tuple[str, float]]  # noise and SNR in dB, by utterance id

UTTERANCE_ID = re.compile(r"(?=.{1,80}$)[A-Za-z0-9-]+_[A-Za-z0-9_-]+")  # p226_001


@dataclass(frozen=True, slots=True)
class Utterance:
    """A clean recording and its noisy twin; noise and SNR are None where no log tells them."""

    id: str
    split: str
    speaker: str
    noise: str | None
    snr_db: float | None
    clean: WavSource
    noisy: WavSource


def find_utterances(root: Path) -> list[Utterance]:
    """Every utterance of the VBD folder `root`, by split (train, validation, test), then by id.

    UserError for a root, folder or zip that is missing, a clean file without its noisy twin
    or the reverse, a name that is not SPEAKER_NUMBER.wav, a log line that cannot be read,
    and a split that would be empty.
    """
    if not root.is_dir():
        raise UserError(f"data root {root} is not a folder: name the folder that holds VoiceBank+DEMAND")
    close_zips()
    sources, logs = _find_sets(root), _read_logs(root)
    utterances: dict[str, list[Utterance]] = {split: [] for split in SPLITS}
    for clean_name, noisy_name, log_name in (TRAINSET, TESTSET):
        clean, noisy, conditions = sources[clean_name], sources[noisy_name], logs[log_name]
        _refuse_missing_twins(root, clean_name, clean, noisy_name, noisy)
        for utterance_id in sorted(clean):
            speaker = utterance_id.split("_")[0]
            split = "test" if log_name == TESTSET[2] else "validation" if speaker in VALIDATION_SPEAKERS else "train"
            noise, snr_db = conditions.get(utterance_id, (None, None))
            twins = clean[utterance_id], noisy[utterance_id]
            utterances[split].append(Utterance(utterance_id, split, speaker, noise, snr_db, *twins))
        if conditions and (unlogged := [utterance_id for utterance_id in clean if utterance_id not in conditions]):
            count = f"{len(unlogged)} of {len(clean)} utterances"
            log.warning("%s lacks %s, first %s: their noise and SNR stay unknown", log_name, count, min(unlogged))
    for split, found in utterances.items():
        if not found:
            held_out = " and ".join(VALIDATION_SPEAKERS)
            speakers = {"train": f"speakers other than {held_out}", "validation": f"speakers {held_out}"}.get(
                split, "any"
            )
            place = TESTSET[0] if split == "test" else TRAINSET[0]
            raise UserError(
                f"{root} has no utterances for the {split} split: "
                f"expected wavs of {speakers} in {place}: unpack the archives again"
            )
    return [utterance for split in SPLITS for utterance in utterances[split]]


def warn_of_unknown_downloads(utterances: Iterable[Utterance]) -> None:
    """Log a warning for each zip in use whose MD5 is not the published one.

    Reads the zips whole (a few seconds a GB); those without a published MD5 are passed over.
    """
    sources = (source for utterance in utterances for source in (utterance.clean, utterance.noisy))
    for path in sorted({source.path for source in sources if source.member is not None}):
        expected = KNOWN_MD5.get(path.name)
        if expected is None:
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != expected:
            log.warning(
                "%s has MD5 %s, published is %s: if files turn out damaged, download it again", path, found, expected
            )


# --- the wavs ------------------------------------------------------------------------------


def _find_sets(root: Path) -> dict[str, dict[str, WavSource]]:
    """The wavs of the four sets, by utterance id; a folder is preferred to its zip."""
    sources, missing = {}, []
    for name in (*TRAINSET[:2], *TESTSET[:2]):
        folder, archive = root / name, root / f"{name}.zip"
        found = _by_id(_wavs_in_folder(folder)) if folder.is_dir() else {}
        if not found and archive.is_file():
            found = _by_id(_wavs_in_zip(archive))
        elif not found and not folder.is_dir():
            missing.append(name)
        sources[name] = found
    if missing:
        raise UserError(
            f"data root {root} lacks {', '.join(missing)} (looked for a folder or a .zip of that name): "
            f"download from https://doi.org/10.7488/ds/2117, or name the folder that holds VoiceBank+DEMAND"
        )
    return sources


def _wavs_in_folder(folder: Path) -> Iterator[WavSource]:
    for path in walked(folder):
        if _is_wav(path.relative_to(folder).as_posix()) and path.is_file():
            yield WavSource(path, None, path.stat().st_size)


def _wavs_in_zip(archive: Path) -> Iterator[WavSource]:
    for member in open_zip(archive).infolist():
        if _is_wav(member.filename) and not member.is_dir():
            yield WavSource(archive, member.filename, member.file_size)


def _is_wav(name: str) -> bool:
    """Whether a file belongs to the corpus: a wav, and none of the twins that macOS adds to zips."""
    path = PurePosixPath(name)
    return path.suffix.lower() == ".wav" and "__MACOSX" not in path.parts and not path.name.startswith(".")


def _by_id(wavs: Iterable[WavSource]) -> dict[str, WavSource]:
    found: dict[str, WavSource] = {}
    for wav in wavs:
        utterance_id = PurePosixPath(wav.member).stem if wav.member is not None else wav.path.stem
        if not UTTERANCE_ID.fullmatch(utterance_id):
            raise UserError(f"{wav.name} is not named SPEAKER_NUMBER.wav, as p226_001.wav is: rename or remove it")
        if utterance_id in found:
            raise UserError(f"{wav.name} and {found[utterance_id].name} have the same name: remove one of them")
        found[utterance_id] = wav
    return found


def _refuse_missing_twins(
    root: Path, clean_name: str, clean: dict[str, WavSource], noisy_name: str, noisy: dict[str, WavSource]
) -> None:
    missing = [f"{noisy_name}/{utterance_id}.wav" for utterance_id in sorted(clean.keys() - noisy.keys())]
    missing += [f"{clean_name}/{utterance_id}.wav" for utterance_id in sorted(noisy.keys() - clean.keys())]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{root} lacks {', '.join(missing[:3])}{more}, whose twins are there: "
            f"each noisy file needs its clean one; unpack the archives again or remove the twins"
        )


# --- the logs ------------------------------------------------------------------------------


def _read_logs(root: Path) -> dict[str, Conditions]:
    """The conditions that each log tells, by the log's name; empty for a log that is not there."""
    found = {name: _find_log(root, name) for name in (TRAINSET[2], TESTSET[2])}
    missing = [name for name, place in found.items() if place is None]
    if missing:
        log.warning("%s has no %s: noise and SNR stay unknown", root, " and no ".join(missing))
    return {name: {} if place is None else _parse_log(*place) for name, place in found.items()}


def _parse_log(place: str, text: str) -> Conditions:
    """Noise and SNR in dB by utterance id, from lines as `p236_002 cafeteria 5`."""
    conditions: Conditions = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            utterance_id, noise, snr = line.split()
            snr_db = float(snr)
        except ValueError:
            snr_db = math.nan
        if not math.isfinite(snr_db):
            raise UserError(
                f"{place} line {number} is {line.strip()[:60]!r}, expected UTTERANCE NOISE SNR "
                f"as in 'p236_002 cafeteria 5': correct the line, or remove the log to do without it"
            )
        if conditions.setdefault(utterance_id, (noise, snr_db)) != (noise, snr_db):
            log.warning("%s line %d contradicts an earlier line on %s, which holds", place, number, utterance_id)
    return conditions


def _find_log(root: Path, log_name: str) -> tuple[str, str] | None:
    """Where a log was found, and its text: in `root`, in a folder of it, or in a zip of logs."""
    for path in (root / log_name, root / "logfiles" / log_name, *sorted(root.glob(f"*/{log_name}"))):
        if path.is_file():
            return str(path), path.read_text(encoding="utf-8-sig", errors="replace")
    for archive in sorted(root.glob("log*.zip")):
        for member in open_zip(archive).namelist():
            if PurePosixPath(member).name == log_name and "__MACOSX" not in PurePosixPath(member).parts:
                try:
                    content = open_zip(archive).read(member)
                except (zipfile.BadZipFile, RuntimeError) as error:
                    raise UserError(f"{archive}:{member} cannot be read ({error}): download the zip again") from None
                return f"{archive}:{member}", content.decode("utf-8-sig", errors="replace")
    return None
