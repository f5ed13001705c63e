"""A stream's hop through a folded BSRNN as one call of compiled C, on a CPU.

torch and onnxruntime run the step as hundreds of library calls on operands of a few kilobytes, and
the calls cost more than the arithmetic. bsrnn/kernel.c does all of it in one, on one thread, and with it the way back
to samples (bsrnn/fourier.h), which in torch takes as long as half a frame of the smallest size. The way there stays
torch's: compression raises what rounding leaves in the bins between pure tones, and of two Fourier transforms that
round differently, outputs differ by 3e-5. The kernel is compiled on first use (bsrnn/compiled.py). Where there is no
compiler, or the model is not one that it knows, `FrameKernel.obstacle` says why, and torch does the work
(bsrnn/streaming.py).

It computes multiples of 16 channels, which fill any processor's vectors. A model of another width runs at the next
multiple, the weights of what is added being zero: a unit of such an LSTM has the cell 0 and the output 0 for ever, so
that the sums stay what they were.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from bsrnn.bands import BandwiseLinear
from bsrnn.compiled import NotCompiledError, library
from bsrnn.model import BSRNN, Block, BlockState
from bsrnn.stft import MAGNITUDE_FLOOR

SOURCE = Path(__file__).with_name("kernel.c")
WIDTH = 16  # as in the source
# From this size on, in bytes, a recurrence over bands has its matrix packed: it passes once a band and direction, and
# what a second-level cache does not hold is slower to fetch than to unpack (measured: 1 MiB gains nothing, 4 MiB 24 %).
PACKED_FROM = 2 << 20


class _Step(ctypes.Structure):
    _fields_ = (
        ("streams", ctypes.c_int),
        ("bins", ctypes.c_int),
        ("bands", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("layers", ctypes.c_int),
        ("packed", ctypes.c_int),
        ("widths", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("work", ctypes.c_void_p),
        ("exponent", ctypes.c_float),
        ("floor", ctypes.c_float),
        ("size", ctypes.c_int),
        ("hop", ctypes.c_int),
        ("window", ctypes.c_void_p),
        ("roots", ctypes.c_void_p),
        ("hop_work", ctypes.c_void_p),
    )


class FrameKernel:
    """One model's frames for a fixed number of streams, from spectra to samples."""

    @staticmethod
    def obstacle(model: BSRNN) -> str | None:
        """Why this model cannot run in the kernel here; None if it can."""
        weight = next(model.parameters())
        if weight.device.type != "cpu":
            return "its weights are not on the CPU"
        if weight.dtype != torch.float32:
            return f"its weights are {weight.dtype}, not torch.float32"
        if model.config.n_fft % 2:
            return f"n_fft = {model.config.n_fft} is odd"
        norms = [model.band_split.norm, model.mask_decoder.norm]
        for block in model.blocks:
            assert isinstance(block, Block)
            norms += [block.time_norm, block.band_norm]
            if block.time_lstm.bidirectional:
                return "it is not causal"
        if not all(isinstance(norm, nn.Identity) for norm in norms) or model.mask_decoder.scale is not None:
            return "its normalisations are not folded"
        try:
            _library()
        except NotCompiledError as error:
            return str(error)
        return None

    def __init__(self, model: BSRNN, num_streams: int) -> None:
        config = model.config
        self.config, self.num_streams = config, num_streams
        self._call_hops = _library().bsrnn_hops
        self._channels = whole_width(config.num_channels)
        packed = 4 * 4 * (2 * self._channels) ** 2 >= PACKED_FROM
        arrays = list(_weights_in_order(model, self._channels, packed))
        self._weights = _aligned(sum(array.size for array in arrays))  # one after another, as they are used
        starts = np.cumsum([0, *(array.size for array in arrays)])
        np.concatenate(arrays, out=self._weights[: starts[-1]])
        self._widths = np.asarray(config.band_widths, dtype=np.int32)
        self._addresses = (self._weights.ctypes.data + 4 * starts).astype(np.uintp)
        self._work, self._hop_work = _aligned(self._scratch_floats()), _aligned(self._hop_floats())
        self._window = model.stft.window.numpy()
        angles = -2 * np.pi * np.arange(config.n_fft) / config.n_fft
        self._roots = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        self._step = _Step(
            num_streams,
            config.num_bins,
            config.num_bands,
            self._channels,
            config.num_layers,
            packed,
            self._widths.ctypes.data,
            self._addresses.ctypes.data,
            self._work.ctypes.data,
            config.compression,
            MAGNITUDE_FLOOR,
            config.n_fft,
            config.hop_length,
            self._window.ctypes.data,
            self._roots.ctypes.data,
            self._hop_work.ctypes.data,
        )
        self._num_bins, self._hop_length = config.num_bins, config.hop_length
        # What was renewed last, and is therefore known to be right, with the addresses of the states.
        self._overlap: Tensor | None = None
        self._envelope: Tensor | None = None
        self._pointers: tuple[list[BlockState], Any, Any] = [], None, None

    def initial_states(self) -> list[BlockState]:
        """Silence before the first frame."""
        zeros = partial(torch.zeros, self._state_shape(), dtype=torch.float32, device="cpu")
        return [(zeros(), zeros()) for _ in range(self.config.num_layers)]

    def hops(
        self,
        spectra: Complex[Tensor, "stream frame bin"],
        states: list[BlockState],
        overlap: Float[Tensor, "stream rest"],
        envelope: Float[Tensor, " rest"],
    ) -> Float[Tensor, "stream sample"]:
        """Enhance frames a hop apart, window and add them: of each the hop that no later one reaches.

        spectra: of windowed samples
        overlap, envelope: what the frames before add to the next n_fft - hop_length samples, contiguous, and the sum of
            their squared windows there. As `states`, they are renewed in place; at the first call with them, states
            are put into memory of the kernel's width, of which they are a view.

        ValueError for tensors of other shapes or kinds.
        """
        num_frames = spectra.shape[1] if spectra.ndim == 3 else 1
        _check("spectra", spectra, torch.complex64, (self.num_streams, num_frames, self._num_bins))
        if overlap is not self._overlap or envelope is not self._envelope:
            self._check_renewed(overlap, envelope)
        spectra = spectra.resolve_conj().contiguous()
        finished = overlap.new_empty(self.num_streams, num_frames * self._hop_length)
        hidden, cell = self._pointers_of(states)
        self._call_hops(
            ctypes.byref(self._step),
            num_frames,
            spectra.data_ptr(),
            hidden,
            cell,
            overlap.data_ptr(),
            envelope.data_ptr(),
            finished.data_ptr(),
        )
        return finished

    def _check_renewed(self, overlap: Tensor, envelope: Tensor) -> None:
        rest = self.config.n_fft - self.config.hop_length
        _check("overlap", overlap, torch.float32, (self.num_streams, rest))
        _check("envelope", envelope, torch.float32, (rest,))
        if not (overlap.is_contiguous() and envelope.is_contiguous()):
            raise ValueError("overlap and envelope are renewed in place: expected both to be contiguous")
        self._overlap, self._envelope = overlap, envelope

    def _pointers_of(self, states: list[BlockState]) -> tuple[ctypes.Array, ctypes.Array]:
        """Of every layer's hidden state and cell, brought to the kernel's width if they were not before."""
        known, hidden, cell = self._pointers
        if len(states) != len(known) or not all(map(operator.is_, states, known)):
            if len(states) != self.config.num_layers:
                raise ValueError(f"states of {len(states)} layers: expected {self.config.num_layers}")
            for part in (part for state in states for part in state):
                _check("a state", part, torch.float32, self._state_shape())
            for index, state in enumerate(states):
                states[index] = (self._widened(state[0]), self._widened(state[1]))
            kind = ctypes.c_void_p * len(states)
            hidden, cell = (kind(*(state[which].data_ptr() for state in states)) for which in (0, 1))
            self._pointers = [*states], hidden, cell
        return hidden, cell

    def _state_shape(self) -> tuple[int, int, int]:
        """Of a layer's hidden state or cell."""
        return 1, self.num_streams * self.config.num_bands, 2 * self.config.num_channels

    def _widened(self, part: Tensor) -> Tensor:
        """A state's part (1, B·K, 2C) whose rows lie 2·`_channels` apart, zeros between them."""
        return _filled(part, -1, 2 * self._channels).contiguous()[..., : part.shape[-1]]

    def _scratch_floats(self) -> int:
        """As kernel.c divides its scratch memory."""
        config, streams, channels = self.config, self.num_streams, self._channels
        hidden, rows = 2 * channels, streams * config.num_bands
        widest = whole_width(2 * max(config.band_widths))
        over_blocks = rows * (channels + 8 * hidden + 2 * hidden) + 2 * streams * hidden
        return streams * 2 * config.num_bins + over_blocks + streams * (8 * channels + 4 * widest)

    def _hop_floats(self) -> int:
        """As kernel.c divides `hop_work`."""
        return self.num_streams * 2 * self.config.num_bins + 4 * self.config.n_fft


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu:
        found = f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name}: {found}: expected {shape} of {dtype} on cpu")


def whole_width(num_channels: int) -> int:
    """The channels that the kernel computes for so many: the next multiple of WIDTH."""
    return -(-num_channels // WIDTH) * WIDTH


def _weights_in_order(model: BSRNN, channels: int, packed: bool) -> Iterator[np.ndarray]:
    """Every weight as kernel.c meets it: matrices as (in, out), biases beside them; filled up to `channels`."""
    hidden = 2 * channels

    def gates(lstm: Any, part: str, suffix: str = "") -> Tensor:
        """(in, 4 gates · hidden) of an LSTM's inputs (ih) or outputs (hh)."""
        weight = _filled(getattr(lstm, f"weight_{part}_l0{suffix}"), -2, hidden, num_parts=4)
        return _filled(weight, -1, channels if part == "ih" else hidden).T

    def bias_of(lstm: Any, suffix: str = "") -> Tensor:
        both = getattr(lstm, f"bias_ih_l0{suffix}") + getattr(lstm, f"bias_hh_l0{suffix}")
        return _filled(both, -1, hidden, num_parts=4)

    def to_channels(linear: nn.Linear, num_parts: int) -> tuple[np.ndarray, np.ndarray]:
        """Of `num_parts` directions."""
        weight = _filled(_filled(linear.weight, -1, hidden, num_parts), -2, channels)
        return _in_panels(weight.T), _floats(_filled(linear.bias, -1, channels))

    for linear in model.band_split.linears:
        assert isinstance(linear, BandwiseLinear)
        for weight, bias in zip(_filled(linear.weight, -1, channels), _filled(linear.bias, -1, channels), strict=True):
            yield from (_in_panels(weight), _floats(bias))
    for block in model.blocks:
        assert isinstance(block, Block)
        time, band, backwards = block.time_lstm, block.band_lstm, "_reverse"
        yield from (_in_panels(gates(time, "ih")), _in_panels(gates(time, "hh")), _floats(bias_of(time)))
        yield from to_channels(block.time_linear, 1)
        yield _in_panels(torch.cat([gates(band, "ih"), gates(band, "ih", backwards)], dim=1))
        yield _floats(torch.cat([bias_of(band), bias_of(band, backwards)]))
        recurrent = [gates(band, "hh"), gates(band, "hh", backwards)]
        if packed:
            words, scales = zip(*(_packed(matrix) for matrix in recurrent), strict=True)
            yield from (np.concatenate(words), np.concatenate(scales))
        else:
            yield from (_in_panels(torch.stack(recurrent)), np.empty(0, np.float32))
        yield from to_channels(block.band_linear, 2)
    decoder = model.mask_decoder
    expand_weight = _filled(_filled(decoder.expand.weight, -1, 4 * channels), -2, channels)  # (2K, C, 4C)
    expand_bias = _filled(decoder.expand.bias, -1, 4 * channels)
    for group, linear in zip(decoder.groups, decoder.outputs, strict=True):
        assert isinstance(linear, BandwiseLinear)
        features = whole_width(2 * group.width)
        weights = _filled(_filled(linear.weight, -1, features, num_parts=2), -2, 4 * channels)  # values, then gates
        biases = _filled(linear.bias, -1, features, num_parts=2)
        for k in range(group.num_bands):
            heads = slice(2 * k, 2 * k + 2)
            both = slice(2 * (group.first_band + k), 2 * (group.first_band + k) + 2)
            yield from (_in_panels(torch.cat([*expand_weight[both]], dim=1)), _floats(torch.cat([*expand_bias[both]])))
            yield from (_in_panels(weights[heads]), _floats(biases[heads]))


def _filled(tensor: Tensor, axis: int, size: int, num_parts: int = 1) -> Tensor:
    """Each of the equal parts of an axis, which is counted from the last, filled up with zeros to `size`."""
    parts = tensor.unflatten(axis, (num_parts, -1))
    before_axis = [0, 0] * (-axis - 1)  # torch names the axes from the last on
    return nn.functional.pad(parts, (*before_axis, 0, size - parts.shape[axis])).flatten(axis - 1, axis)


def _floats(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float32).ravel()


def _in_panels(tensor: Tensor) -> np.ndarray:
    """A matrix (in, out), or several on a leading axis, as panels of columns one after another."""
    matrices = tensor.detach().numpy().astype(np.float32).reshape(-1, *tensor.shape[-2:])
    panel = _library().bsrnn_panel()
    panels = [matrix[:, j : j + panel].ravel() for matrix in matrices for j in range(0, matrix.shape[1], panel)]
    return np.concatenate(panels)


def _packed(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """A matrix (in, out) in panels of packed weights, and each output's scale.

    24 bits hold a weight to 2^-24 of the largest of its output, about what sums in 32 bits are good for. `unpack` in
    kernel.c says how four vectors of weights lie in three of words, which are given as floats.
    """
    matrix = tensor.detach().numpy().astype(np.float64)
    largest = np.maximum(np.abs(matrix).max(0), np.finfo(np.float32).tiny)
    scale = largest / (2**31 - 2**8)  # of a weight as a whole number of 32 bits
    vectors = (len(matrix), -1, 4, _library().bsrnn_lanes())
    wholes = (matrix / scale).reshape(vectors).swapaxes(0, 1)  # (panel, in, vector, lane)
    last = np.rint(wholes[:, :, 3] / 256).astype(np.int64)
    lowest = np.stack([last >> shift & 255 for shift in (16, 8, 0)], axis=2)
    upper = np.rint((wholes[:, :, :3] - lowest) / 256).astype(np.int64)
    words = (upper << 8 | lowest).astype(np.int32)
    return words.view(np.float32).ravel(), scale.astype(np.float32)


def _aligned(num_floats: int) -> np.ndarray:
    """Zeros that begin at a cache line, so that no vector is read across two."""
    raw = np.zeros(num_floats * 4 + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + num_floats * 4].view(np.float32)


def _library() -> ctypes.CDLL:
    """The compiled kernel; NotCompiledError where it cannot be had."""
    loaded = library(SOURCE)
    loaded.bsrnn_hops.restype = None
    loaded.bsrnn_hops.argtypes = (ctypes.c_void_p, ctypes.c_int, *(ctypes.c_void_p,) * 6)
    return loaded
