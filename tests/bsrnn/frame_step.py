"""The network's part of the compiled kernel alone: a frame from spectrum to spectrum, without the way to samples."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from bsrnn.kernel import FrameKernel, _library
from bsrnn.model import BlockState


def enhance_frame(kernel: FrameKernel, spectrum: Tensor, states: list[BlockState]) -> Tensor:
    """Enhance uncompressed spectra (stream, bin), which are contiguous; `states` are renewed as by `kernel.hops`."""
    enhanced = torch.empty_like(spectrum)
    call = _library().bsrnn_step
    call.restype, call.argtypes = None, (ctypes.c_void_p,) * 5
    hidden, cell = kernel._pointers_of(states)
    call(ctypes.byref(kernel._step), spectrum.data_ptr(), hidden, cell, enhanced.data_ptr())
    return enhanced
