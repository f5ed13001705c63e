"""Streaming: audio in chunks of any length in, enhanced audio out, with the latency of one STFT window.

A stream gives, sample for sample, what `BSRNN.forward` gives for the whole signal:

1. The first frame is centred on the first sample, so n_fft / 2 samples are mirrored before it,
   as torch.stft does.
2. Each complete frame goes through the network, which carries its states from frame to frame.
3. Frames are windowed, overlapped and added. A sample is final, and returned, once the last frame that
   reaches it is in: at most n_fft samples after it came.
4. `flush` adds silence up to a whole hop, mirrors that end, as bsrnn/stft.py does, and returns what is left.

A few frames take 2 and 3 in the compiled kernel (bsrnn/kernel.py) where there is one; a long chunk goes through torch
as one batch of frames, which shares each weight's way through memory.

Several streams of equal length run as a batch, each with states of its own.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Complex, Float, Shaped
from torch import Tensor

from bsrnn.folding import fold
from bsrnn.kernel import FrameKernel, whole_width
from bsrnn.model import BSRNN, BlockState
from bsrnn.stft import compress, decompress, whole_hops

# Up to KERNEL_WORK · channels / width^3 frames in a chunk, with the width that the kernel computes for, and up to
# KERNEL_FRAMES in any case, the kernel takes frame by frame, above that torch their batch. Measured, the two are level
# at 16 frames of 2 channels, 25 of 8, 128 of 16, 7 of 24, 11 of 32, 6 of 48, 6 of 64 and 4 of 128.
KERNEL_WORK, KERNEL_FRAMES = 16_384, 4


@runtime_checkable
class FrameStep(Protocol):
    """Enhances frames one by one."""

    def initial_states(self) -> list[BlockState]:
        """Silence before the first frame."""

    def step(self, spectrum: Complex[Tensor, "stream bin"], states: list[BlockState]) -> Complex[Tensor, "stream bin"]:
        """Enhance one frame of uncompressed spectra; `states` are renewed in place."""


class Stream:
    """One or several streams of audio on their way through a model.

    model: trained and not folded; it is folded here and stays as it is; ValueError if it does not stream
    use_kernel: False takes torch for every frame; True demands the kernel, ValueError where there
        is none; None takes it where it is to be had
    step: what enhances single frames instead of the kernel
    """

    def __init__(
        self, model: BSRNN, num_streams: int = 1, use_kernel: bool | None = None, step: FrameStep | None = None
    ) -> None:
        if num_streams < 1:
            raise ValueError(f"num_streams = {num_streams}: expected at least 1")
        self.config = model.config
        self.config.check_streams()
        self._model = fold(model).requires_grad_(False)
        self.num_streams = num_streams
        self._window = self._model.stft.window
        self._step, self._use_kernel = step, use_kernel
        channels = self.config.num_channels
        self._kernel_frames = max(KERNEL_FRAMES, KERNEL_WORK * channels // whole_width(channels) ** 3)
        self._kernel = self._kernel_here()
        self.reset()

    def _kernel_here(self) -> FrameKernel | None:
        if self._use_kernel is False or self._step is not None:
            return None
        reason = FrameKernel.obstacle(self._model)
        if reason is None:
            return FrameKernel(self._model, self.num_streams)
        if self._use_kernel:
            raise ValueError(f"no kernel for this model: {reason}")
        return None

    def __getstate__(self) -> dict[str, Any]:
        """All but the kernel: a copy has one of its own, made on the machine where it is."""
        return {name: value for name, value in self.__dict__.items() if name != "_kernel"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._kernel = self._kernel_here()

    def reset(self) -> None:
        """Forget everything: the next sample is the first of a new signal."""
        n_fft, hop = self.config.n_fft, self.config.hop_length
        self.num_samples = 0  # taken in since the beginning
        self._num_returned = 0
        self._states: list[BlockState] | None = None
        # The sample before the next frame, which the end's mirror may reach, and what is there of that frame.
        self._pending = self._window.new_zeros(self.num_streams, 1)
        self._overlap = self._window.new_zeros(self.num_streams, n_fft - hop)  # of the frames so far
        self._envelope = self._window.new_zeros(n_fft - hop)  # their squared windows, added in the same way
        self._inverse: Tensor | None = None  # of a hop's envelope, once it is the same for every hop
        self._to_drop = n_fft // 2  # of the output, which begins where the mirrored beginning does

    @torch.inference_mode()
    def process(self, chunk: Shaped[Tensor, "stream sample"]) -> Float[Tensor, "stream enhanced"]:
        """Take in the next samples, any number of them, full scale ±1; the enhanced samples that are final now."""
        if chunk.ndim != 2 or chunk.shape[0] != self.num_streams:
            raise ValueError(f"a chunk of shape {tuple(chunk.shape)}: expected ({self.num_streams}, samples)")
        if not chunk.is_floating_point():
            raise ValueError(f"a chunk of {chunk.dtype}: expected floats, full scale ±1")
        half = self.config.n_fft // 2
        is_begun = self.num_samples > half
        self.num_samples += chunk.shape[1]
        self._pending = torch.cat([self._pending, chunk.to(self._window)], dim=1)
        if not is_begun:
            if self.num_samples <= half:
                return self._pending[:, :0]
            beginning = self._pending[:, 2 : half + 2].flip(1)
            self._pending = torch.cat([self._pending[:, :1], beginning, self._pending[:, 1:]], dim=1)
        return self._advance()

    @torch.inference_mode()
    def flush(self) -> Float[Tensor, "stream enhanced"]:
        """End the signal: the enhanced samples that are left. The next sample begins a new signal."""
        half, num_left = self.config.n_fft // 2, self.num_samples - self._num_returned
        silence = whole_hops(self.num_samples, self.config.n_fft, self.config.hop_length) - self.num_samples
        before = self.process(self._window.new_zeros(self.num_streams, silence))
        self._pending = torch.cat([self._pending, self._pending[:, -half - 1 : -1].flip(1)], dim=1)
        finished = self._advance()
        rest = self._overlap[:, self._to_drop :] / self._envelope[self._to_drop :]
        self.reset()
        return torch.cat([before, finished, rest], dim=1)[:, :num_left]

    def state_dict(self) -> dict[str, Any]:
        """Everything a stream has to remember, as tensors, lists and numbers; torch.save keeps it."""
        states = self._states
        return {
            "identity": self._identity(),
            "num_samples": self.num_samples,
            "num_returned": self._num_returned,
            "to_drop": self._to_drop,
            "pending": self._pending.clone(),
            "overlap": self._overlap.clone(),
            "envelope": self._envelope.clone(),
            "states": None if states is None else [tuple(part.clone() for part in state) for state in states],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream of the same model was.

        ValueError if it was of another architecture, precision or number of streams; weights are not compared.
        """
        theirs = state.get("identity", {})
        for name, value in self._identity().items():
            if theirs.get(name) != value:
                raise ValueError(f"this state is of another stream, {name} = {theirs.get(name)}: expected {value}")
        self.num_samples, self._num_returned = state["num_samples"], state["num_returned"]
        self._to_drop = state["to_drop"]
        self._inverse = None
        device = self._window.device  # of each its own precision: a cumulative norm's sums have more bits
        self._pending, self._overlap, self._envelope = (
            state[name].to(device, copy=True) for name in ("pending", "overlap", "envelope")
        )
        states = state["states"] or ()
        self._states = [tuple(part.to(device, copy=True) for part in one) for one in states] or None

    def _identity(self) -> dict[str, Any]:
        """What two streams have in common if one may go on where the other was."""
        architecture = asdict(replace(self.config, norm_batch=None))  # of which training alone knows
        return {"num_streams": self.num_streams, "precision": str(self._window.dtype), **architecture}

    def _advance(self) -> Tensor:
        """Enhance the complete frames that are pending; the samples that this makes final."""
        n_fft, hop = self.config.n_fft, self.config.hop_length
        num_frames = (self._pending.shape[1] - 1 - n_fft) // hop + 1
        if num_frames <= 0:
            return self._pending[:, :0]
        frames = self._pending[:, 1:].unfold(1, n_fft, hop)  # (B, T, n_fft)
        self._pending = self._pending[:, num_frames * hop :]
        spectra = torch.fft.rfft(frames * self._window)  # (B, T, F)
        if self._kernel is not None and num_frames <= self._kernel_frames:
            finished = self._by_kernel(self._kernel, spectra)
        else:
            finished = self._overlap_add(torch.fft.irfft(self._enhance(spectra), n_fft) * self._window)
        dropped = min(self._to_drop, finished.shape[1])
        self._to_drop -= dropped
        self._num_returned += finished.shape[1] - dropped
        return finished[:, dropped:]

    def _by_kernel(
        self, kernel: FrameKernel, spectra: Complex[Tensor, "stream frame bin"]
    ) -> Float[Tensor, "stream enhanced"]:
        if self._states is None:
            self._states = kernel.initial_states()
        self._overlap, self._envelope = self._overlap.contiguous(), self._envelope.contiguous()
        return kernel.hops(spectra, self._states, self._overlap, self._envelope)

    def _enhance(self, spectrum: Complex[Tensor, "stream frame bin"]) -> Complex[Tensor, "stream frame bin"]:
        if self._step is not None:
            if self._states is None:
                self._states = self._step.initial_states()
            frames = [self._step.step(frame, self._states) for frame in spectrum.unbind(1)]
            return torch.stack(frames, dim=1) if len(frames) > 1 else frames[0].unsqueeze(1)
        exponent = self.config.compression
        compressed = compress(spectrum, exponent).transpose(1, 2)  # (B, F, T)
        enhanced, self._states = self._model.enhance_spectrum(compressed, self._states)
        return decompress(enhanced, exponent).transpose(1, 2)

    def _overlap_add(self, frames: Float[Tensor, "stream frame n_fft"]) -> Float[Tensor, "stream enhanced"]:
        n_fft, hop = self.config.n_fft, self.config.hop_length
        num_frames = frames.shape[1]
        num_final, covered = num_frames * hop, n_fft - hop
        if num_frames == 1:
            total = frames[:, 0]
        else:
            total = frames.new_zeros(self.num_streams, num_final + covered)
            for t in range(num_frames):
                total[:, t * hop : t * hop + n_fft] += frames[:, t]
        total[:, :covered] += self._overlap
        self._overlap = total[:, num_final:]
        if self._inverse is None:
            return total[:, :num_final] / self._renewed_envelope(num_frames)
        return (total[:, :num_final].view(self.num_streams, -1, hop) * self._inverse).flatten(1)

    def _renewed_envelope(self, num_frames: int) -> Float[Tensor, " sample"]:
        """The squared windows added over the samples that frames make final; kept up until it repeats itself."""
        n_fft, hop = self.config.n_fft, self.config.hop_length
        num_final = num_frames * hop
        envelope = self._window.new_zeros(num_final + n_fft - hop)
        envelope[: n_fft - hop] = self._envelope
        squared = self._window.square()
        for t in range(num_frames):
            envelope[t * hop : t * hop + n_fft] += squared
        if torch.equal(envelope[num_final:], self._envelope):
            self._inverse = 1 / envelope[num_final - hop : num_final]
        self._envelope = envelope[num_final:]
        return envelope[:num_final]
