"""torch's LSTM of one layer, in compiled C where that is faster: on a CPU, up to the size that a near cache holds.

Most of a training step on a CPU is the LSTMs, and most of theirs is not arithmetic (docs/performance.md).
bsrnn/lstm.c takes a few rows through all steps, each step one pass over registers, and adds up the weights' gradients
on the way. It runs on torch's threads, is compiled on first use (bsrnn/compiled.py), and differs from the library's
in rounding alone. Where there is no compiler, on a GPU, under autocast, in other precisions and for larger sizes the
library does the work; `LSTM.obstacle` says why.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bsrnn.compiled import library

SOURCE = Path(__file__).with_name("lstm.c")
ROWS = 6  # of a tile in the source, the least that a thread gets
LARGEST_HIDDEN = 128  # at 256 the library's products of whole steps are as fast (measured: docs/performance.md)

_by_library = False


def obstacle() -> str | None:
    """Why no LSTM can be the compiled one here; None if it can."""
    return _library() if isinstance(_library(), str) else None


@contextmanager
def by_library() -> Iterator[None]:
    """Within it, every LSTM is the library's: to compare with, and to count operators."""
    global _by_library
    before, _by_library = _by_library, True
    try:
        yield
    finally:
        _by_library = before


class LSTM(nn.LSTM):
    """nn.LSTM of one layer, with its parameters, inputs, outputs and states."""

    def __init__(
        self, input_size: int, hidden_size: int, *, bidirectional: bool = False, batch_first: bool = False
    ) -> None:
        super().__init__(input_size, hidden_size, bidirectional=bidirectional, batch_first=batch_first)

    def forward(  # type: ignore[override]  # torch's also takes packed sequences
        self, x: Float[Tensor, "_ _ input"], state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Float[Tensor, "_ _ output"], tuple[Tensor, Tensor]]:
        """(outputs, the last outputs and cells of each direction); x is (step, row, input), rows first if so asked."""
        if _by_library or torch.compiler.is_compiling() or self.obstacle(x) is not None:
            return super().forward(x, state)
        if state is None:
            self.check_input(x, None)
        else:
            self.check_forward_args(x, state, None)
        h0, c0 = state if state is not None else (None, None)
        is_kept = torch.is_grad_enabled()  # what a backward pass needs
        outputs, hidden, cell = _Fused.apply(x, h0, c0, self.batch_first, is_kept, *self._flat_weights)
        return outputs, (hidden, cell)

    def obstacle(self, x: Tensor) -> str | None:
        """Why the library's LSTM takes this input; None if the compiled one does."""
        if x.device.type != "cpu" or self.weight_ih_l0.device.type != "cpu":
            return "it is not on the CPU"
        if {x.dtype, self.weight_ih_l0.dtype} != {torch.float32} or torch.is_autocast_enabled("cpu"):
            return "it is not in 32 bits"
        if x.dim() != 3 or not x.numel():
            return "it is no batch of steps"
        if self.hidden_size > LARGEST_HIDDEN:
            return f"its hidden size is above {LARGEST_HIDDEN}"
        return obstacle()


class _Shape(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int)
        for name in ("steps", "rows", "inputs", "hidden", "units", "directions", "rows_first", "parts")
    )


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor | None, c0: Tensor | None, rows_first: bool, is_kept: bool, *weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, weights = x.contiguous(), tuple(weight.contiguous() for weight in weights)
        shape = _shape_of(x, rows_first, weights)
        directions, hidden = shape.directions, shape.hidden
        h0, c0 = (None if part is None else _filled(part, hidden) for part in (h0, c0))
        outputs = x.new_empty(*x.shape[:2], directions, hidden)
        cells = torch.empty_like(outputs) if is_kept else x.new_empty(directions, shape.rows, hidden)
        gates = x.new_empty(*x.shape[:2], directions, 4 * hidden) if is_kept else None
        call = _library()
        scratch = x.new_empty(call.lstm_forward_scratch(ctypes.byref(shape)))
        call.lstm_forward(
            ctypes.byref(shape), _addresses(weights), *map(_address, (x, h0, c0, outputs, cells, gates, scratch))
        )
        if is_kept:
            ctx.rows_first = rows_first
            ctx.save_for_backward(x, h0, c0, outputs, cells, gates, *weights)
            last_cells = _last(cells, rows_first, shape.units)
        else:
            last_cells = cells[..., : shape.units]
        return _units_of(outputs, shape.units), _last(outputs, rows_first, shape.units), last_cells

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_outputs: Tensor, of_hidden: Tensor, of_cells: Tensor) -> tuple[Tensor | None, ...]:
        x, h0, c0, outputs, cells, gates, *weights = ctx.saved_tensors
        shape = _shape_of(x, ctx.rows_first, weights)
        directions, hidden, units = shape.directions, shape.hidden, shape.units
        of_outputs = _filled(of_outputs.unflatten(-1, (directions, units)), hidden)
        # these two become the gradients of h0 and c0
        of_hidden, of_cells = (_filled(part, hidden).clone() for part in (of_hidden, of_cells))
        lanes = _library().lstm_lanes()
        of_x = x.new_empty(*x.shape[:2], -(-shape.inputs // lanes) * lanes)
        of_weights = [[torch.empty_like(weight) for weight in weights[4 * d : 4 * d + 3]] for d in range(directions)]
        call = _library()
        scratch = x.new_empty(call.lstm_backward_scratch(ctypes.byref(shape)))
        saved = map(_address, (x, h0, c0, outputs, cells, gates, of_outputs, of_hidden, of_cells, of_x))
        written = _addresses([part for parts in of_weights for part in parts])
        call.lstm_backward(ctypes.byref(shape), _addresses(weights), *saved, written, _address(scratch))
        of_h0, of_c0 = (
            gradient[..., :units] if state is not None else None
            for gradient, state in ((of_hidden, h0), (of_cells, c0))
        )
        of_either_bias = (part for of_ih, of_hh, of_bias in of_weights for part in (of_ih, of_hh, of_bias, of_bias))
        return of_x[..., : shape.inputs], of_h0, of_c0, None, None, *of_either_bias


def _shape_of(x: Tensor, rows_first: bool, weights: Sequence[Tensor]) -> _Shape:
    steps, rows = (x.shape[1], x.shape[0]) if rows_first else (x.shape[0], x.shape[1])
    units = weights[1].shape[1]
    lanes = _library().lstm_lanes()
    hidden = -(-units // lanes) * lanes
    parts = min(torch.get_num_threads(), -(-rows // ROWS))
    return _Shape(steps, rows, x.shape[2], hidden, units, len(weights) // 4, rows_first, parts)


def _filled(part: Tensor, hidden: int) -> Tensor:
    """Its last axis filled up with zeros, if it is shorter."""
    if part.shape[-1] == hidden:
        return part.contiguous()
    return nn.functional.pad(part, (0, hidden - part.shape[-1]))


def _units_of(part: Tensor, units: int) -> Tensor:
    """(…, direction, hidden) to (…, direction · units)."""
    return part[..., :units].flatten(-2)


def _last(part: Tensor, rows_first: bool, units: int) -> Tensor:
    """Of (position, direction, hidden) the last step of each direction: (direction, row, units)."""
    by_step = part.transpose(0, 1) if rows_first else part
    ends = (by_step[-1, :, 0], by_step[0, :, 1]) if part.shape[2] == 2 else (by_step[-1, :, 0],)
    return torch.stack(ends)[..., :units]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


@lru_cache(maxsize=1)
def _library() -> Any:
    """The compiled source; a line that says why where it cannot be had."""
    try:
        loaded = library(SOURCE, "-fopenmp")
    except (OSError, subprocess.SubprocessError):
        try:  # of a compiler without OpenMP, on one thread
            loaded = library(SOURCE)
        except (OSError, subprocess.SubprocessError) as error:
            return f"{SOURCE.name} could not be compiled ({error})"
    pointer = ctypes.c_void_p
    for name in ("lstm_forward_scratch", "lstm_backward_scratch"):
        getattr(loaded, name).argtypes, getattr(loaded, name).restype = [pointer], ctypes.c_long
    loaded.lstm_forward.argtypes, loaded.lstm_forward.restype = [pointer] * 9, None
    loaded.lstm_backward.argtypes, loaded.lstm_backward.restype = [pointer] * 14, None
    return loaded
