"""torch's LSTM of one layer, in compiled C where that is faster: on a CPU, up to the size that a near cache holds.

Most of a training step on a CPU is the LSTMs, and most of theirs is not arithmetic (docs/performance.md).
bsrnn/lstm.c takes a few rows through all steps, each step one pass over registers, and adds up the weights' gradients
on the way. It runs on torch's threads, is compiled on first use (bsrnn/compiled.py), and differs from the library's
in rounding alone. Elsewhere the library does the work; `LSTM.obstacle` says where and why.

Rows are the batch. Inputs are (step, row, input), outputs (step, row, direction · unit), or both with rows first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from bsrnn.compiled import CompilerError, NotCompiledError, library

SOURCE = Path(__file__).with_name("lstm.c")
LARGEST_HIDDEN = 128  # at 256 the library's products of whole steps are as fast (measured: docs/performance.md)


def keep_out_of_graphs() -> None:
    """Let torch.compile call the LSTMs of this process instead of looking into them: what it would find is ctypes."""
    if not hasattr(LSTM.forward, "_torchdynamo_disable"):
        LSTM.forward = torch.compiler.disable(LSTM.forward)  # type: ignore[method-assign]


class LSTM(nn.LSTM):
    """nn.LSTM of one layer, with its parameters, inputs, outputs and states; differentiable once."""

    def __init__(
        self, input_size: int, hidden_size: int, *, bidirectional: bool = False, batch_first: bool = False
    ) -> None:
        super().__init__(input_size, hidden_size, bidirectional=bidirectional, batch_first=batch_first)

    def forward(  # type: ignore[override]  # torch's also takes packed sequences
        self, input: Float[Tensor, "first second input"], hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Float[Tensor, "first second output"], tuple[Tensor, Tensor]]:
        """(outputs, the last outputs and cells (direction, row, unit) each), going on from `hx`, or from zeros."""
        device = input.device.type
        if (
            device in ("cpu", "cuda")
            and torch.is_autocast_enabled(device)
            and torch.get_autocast_dtype(device) == torch.bfloat16
            and self.weight_ih_l0.dtype == torch.float32
        ):
            # Asked for bfloat16, torch gives cuDNN's LSTMs 16-bit floats, in which most of the gradients are 0, and
            # oneDNN has such LSTMs for processors with AVX-512 alone.
            with torch.autocast(device, enabled=False):
                states = None if hx is None else (hx[0].float(), hx[1].float())
                return LSTM.forward(self, input.float(), states)  # whatever wraps the instance's stays outside
        if self.obstacle(input, *(hx or ())) is not None or not self._weights_fit():
            return super().forward(input, hx)
        if hx is None:
            self.check_input(input, None)
        else:
            self.check_forward_args(input, hx, None)
        h0, c0 = hx if hx is not None else (None, None)
        weights = self._weights()
        # whether a backward pass may come, for which gates are kept
        is_kept = torch.is_grad_enabled() and any(part.requires_grad for part in (input, *(hx or ()), *weights))
        outputs, hidden, cell = _Fused.apply(input, h0, c0, self.batch_first, is_kept, *weights)
        return outputs, (hidden, cell)

    def obstacle(self, *inputs: Any) -> str | None:
        """Why the library's LSTM takes these inputs (x, or x and both states); None if the compiled one does.

        Under autocast to bfloat16, for which `forward` makes 32 bits of them, it is to be asked outside.
        """
        if self.hidden_size > LARGEST_HIDDEN:
            return f"its hidden size is above {LARGEST_HIDDEN}"
        # Tracers and modes of torch see calls of torch alone.
        if (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or _get_current_dispatch_mode() is not None
            or torch._C._functorch.maybe_current_level() is not None
        ):
            return "torch is tracing or transforming the operators"
        if not all(isinstance(part, Tensor) and part.dim() == 3 and part.numel() for part in inputs):
            return "inputs are not non-empty 3-D tensors"
        tensors = (*inputs, *self._weights())
        if any(type(part) not in (Tensor, nn.Parameter) for part in tensors):  # they may have no memory of their own
            return "an input or a weight is of a subclass of torch.Tensor"
        if any(part.device.type != "cpu" for part in tensors):
            return "an input or a weight is not on the CPU"
        if torch.is_autocast_enabled("cpu") or any(part.dtype != torch.float32 for part in tensors):
            return "it is not computed in 32 bits"
        kernel = _library()
        if isinstance(kernel, str):
            return kernel
        if not kernel.has_threads and torch.get_num_threads() > 1:
            return f"compiled without OpenMP, torch uses {torch.get_num_threads()} threads"
        return None

    def _weights(self) -> list[Tensor]:
        """By their names, under which torch.func.functional_call and parametrizations put others."""
        kinds = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        ways = ("", "_reverse") if self.bidirectional else ("",)
        return [getattr(self, kind + way) for way in ways for kind in kinds]

    def _weights_fit(self) -> bool:
        """Whether they have the shapes that C reads; to be asked in `forward` alone, where ZeRO's are whole."""
        gates = 4 * self.hidden_size
        shapes = [(gates, self.input_size), (gates, self.hidden_size), (gates,), (gates,)] * (1 + self.bidirectional)
        return all(weight.shape == shape for weight, shape in zip(self._weights(), shapes, strict=True))


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
        h0, c0 = (None if part is None else _as_wide(part, hidden) for part in (h0, c0))
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
        of_outputs = _as_wide(of_outputs.unflatten(-1, (directions, units)), hidden)
        # these two become the gradients of h0 and c0
        of_hidden, of_cells = (_as_wide(part, hidden).clone() for part in (of_hidden, of_cells))
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
        of_parameters = (part for ih, hh, bias in of_weights for part in (ih, hh, bias, bias.clone()))
        return of_x[..., : shape.inputs], of_h0, of_c0, None, None, *of_parameters


def _shape_of(x: Tensor, rows_first: bool, weights: Sequence[Tensor]) -> _Shape:
    steps, rows = (x.shape[1], x.shape[0]) if rows_first else (x.shape[0], x.shape[1])
    units = weights[1].shape[1]
    lanes = _library().lstm_lanes()
    hidden = -(-units // lanes) * lanes
    parts = min(torch.get_num_threads(), -(-rows // _library().lstm_rows()))
    return _Shape(steps, rows, x.shape[2], hidden, units, len(weights) // 4, rows_first, parts)


def _as_wide(part: Tensor, hidden: int) -> Tensor:
    """Its last axis filled up with zeros, if it is shorter."""
    if part.shape[-1] == hidden:
        return part.contiguous()
    return nn.functional.pad(part, (0, hidden - part.shape[-1])).contiguous()  # padded channels last stay so


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
    loaded, has_threads, why = None, True, ""
    for flags in (("-fopenmp",), ()):  # a compiler without OpenMP makes it for one thread
        try:
            loaded, has_threads = library(SOURCE, *flags), bool(flags)
            break
        except NotCompiledError as error:
            why = why or str(error)
            if not isinstance(error, CompilerError):
                break
    if loaded is None:
        return why
    loaded.has_threads = has_threads  # type: ignore[attr-defined]
    pointer = ctypes.c_void_p
    for name in ("lstm_forward_scratch", "lstm_backward_scratch"):
        getattr(loaded, name).argtypes, getattr(loaded, name).restype = [pointer], ctypes.c_long
    loaded.lstm_forward.argtypes, loaded.lstm_forward.restype = [pointer] * 9, None
    loaded.lstm_backward.argtypes, loaded.lstm_backward.restype = [pointer] * 14, None
    return loaded
