"""The streaming step as an ONNX model, for runtimes without torch.

    python -m bsrnn.onnx CHECKPOINT OUTPUT.onnx [streams=N]

The step takes one STFT frame and the network's states and gives the enhanced frame and the states
renewed; every normalisation is folded. The frame is that of bsrnn/streaming.py (Hann window, hop of
half a window at the sizes of this project): what runs the step adds silence up to a whole hop, mirrors half a
window at either end, does the FFT and adds the overlapping halves.

    spectrum (streams, bins, 2)    real and imaginary parts, not compressed   → enhanced, the same
    hidden   (layers, streams · bands, 2C)   zeros before the first frame     → hidden_renewed
    cell     (layers, streams · bands, 2C)   zeros before the first frame     → cell_renewed

The graph is written node by node from the weights, because torch's exporter unrolls an LSTM into
its steps or needs another one in its place; ONNX has the operator. The command checks the
file against torch, frame by frame, through onnxruntime.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from bsrnn.bands import BandwiseLinear
from bsrnn.command import run_main, settings
from bsrnn.folding import fold
from bsrnn.model import BSRNN, Block
from bsrnn.modelfile import load_model, model_path, whole_file
from bsrnn.stft import MAGNITUDE_FLOOR, compress, decompress

OPSET = 17
# torch's gates are input, forget, cell, output; ONNX's are input, output, forget, cell.
GATES = [0, 3, 1, 2]


def export(model: BSRNN, num_streams: int = 1) -> onnx.ModelProto:
    """The streaming step of a model that is not folded yet; ValueError for a variant that has no such step."""
    return _Graph(fold(model), num_streams).build()


class Session:
    """An exported step in onnxruntime, on one thread, with its states."""

    def __init__(self, exported: onnx.ModelProto) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            exported.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        shape = self._session.get_inputs()[1].shape
        self._states = [np.zeros(shape, np.float32), np.zeros(shape, np.float32)]

    def step(self, spectrum: np.ndarray) -> np.ndarray:
        """Enhance one frame, (streams, bins, 2)."""
        inputs = {"spectrum": spectrum, "hidden": self._states[0], "cell": self._states[1]}
        enhanced, *self._states = self._session.run(None, inputs)
        return enhanced


@torch.inference_mode()
def largest_difference(model: BSRNN, exported: onnx.ModelProto, num_frames: int) -> float:
    """Of the enhanced frames of noise, one after another, between onnxruntime and torch; relative to the largest."""
    session = Session(exported)
    num_streams = exported.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    folded, exponent = fold(model), model.config.compression
    generator = torch.Generator().manual_seed(0)
    states, difference, largest = None, 0.0, 0.0
    for _ in range(num_frames):
        frame = torch.randn(num_streams, model.config.num_bins, 2, generator=generator)
        spectrum = torch.view_as_complex(frame).unsqueeze(2)  # (B, F, 1)
        enhanced, states = folded.enhance_spectrum(compress(spectrum, exponent), states)
        expected = torch.view_as_real(decompress(enhanced, exponent).squeeze(2)).numpy()
        difference = max(difference, float(np.abs(session.step(frame.numpy()) - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
    return difference / largest


class _Graph:
    """Nodes and weights of the step as they are put down, in order."""

    def __init__(self, model: BSRNN, num_streams: int) -> None:
        norms = [model.band_split.norm, model.mask_decoder.norm]
        for block in model.blocks:
            assert isinstance(block, Block)
            norms += [block.time_norm, block.band_norm]
            if block.time_lstm.bidirectional:
                raise ValueError("this model is not causal: it has no streaming step to export")
        if not all(isinstance(norm, nn.Identity) for norm in norms):
            raise ValueError("this model's norms follow the signal: only batch normalisation is exported")
        self.model, self.config, self.num_streams = model, model.config, num_streams
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def build(self) -> onnx.ModelProto:
        config, streams = self.config, self.num_streams
        rows, hidden = streams * config.num_bands, 2 * config.num_channels
        compressed = self._powered("spectrum", config.compression - 1, floor=MAGNITUDE_FLOOR)
        x = self._band_split(compressed)  # (B, K, C)
        hidden_in = self._split("hidden", config.num_layers, axis=0)
        cell_in = self._split("cell", config.num_layers, axis=0)
        hidden_out, cell_out = [], []
        for block, before, cell_before in zip(self.model.blocks, hidden_in, cell_in, strict=True):
            assert isinstance(block, Block)
            x, after, cell_after = self._over_time(block, x, before, cell_before)
            x = self._over_bands(block, x)
            hidden_out.append(after)
            cell_out.append(cell_after)
        mask, residual = self._mask_decoder(x)
        enhanced = self._op("Add", self._complex_product(mask, compressed), residual)
        self._powered(enhanced, 1 / config.compression - 1, name="enhanced")
        self._op("Concat", *hidden_out, name="hidden_renewed", axis=0)
        self._op("Concat", *cell_out, name="cell_renewed", axis=0)
        spectrum, states = [streams, config.num_bins, 2], [config.num_layers, rows, hidden]
        graph = helper.make_graph(
            self.nodes,
            "bsrnn_step",
            [_tensor("spectrum", spectrum), _tensor("hidden", states), _tensor("cell", states)],
            [_tensor("enhanced", spectrum), _tensor("hidden_renewed", states), _tensor("cell_renewed", states)],
            self.weights,
        )
        exported = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        front_end = {"n_fft": config.n_fft, "hop_length": config.hop_length, "sample_rate": config.sample_rate}
        helper.set_model_props(exported, {name: str(value) for name, value in front_end.items()})
        onnx.checker.check_model(exported, full_check=True)
        return exported

    def _band_split(self, compressed: str) -> str:
        split, config = self.model.band_split, self.config
        flat = self._reshape(compressed, self.num_streams, -1)
        parts = self._split(flat, [2 * group.num_bins for group in split.groups], axis=1)
        bands = []
        for group, linear, part in zip(split.groups, split.linears, parts, strict=True):
            part = self._reshape(part, self.num_streams, group.num_bands, 2 * group.width)
            bands.append(self._bandwise(self._op("Transpose", part, perm=[1, 0, 2]), linear))  # (K, B, C)
        joined = self._op("Concat", *bands, axis=0) if len(bands) > 1 else bands[0]
        assert config.num_bands == sum(group.num_bands for group in split.groups)
        return self._op("Transpose", joined, perm=[1, 0, 2])

    def _over_time(self, block: Block, x: str, hidden: str, cell: str) -> tuple[str, str, str]:
        rows = self._reshape(x, 1, -1, self.config.num_channels)  # (1, B·K, C)
        weights = self._lstm_weights(block.time_lstm, [""])
        _, hidden, cell = self._lstm(rows, weights, 2 * self.config.num_channels, "forward", hidden, cell)
        over_time = self._reshape(self._linear(hidden, block.time_linear), *self._shape())
        return self._op("Add", x, over_time), hidden, cell

    def _over_bands(self, block: Block, x: str) -> str:
        hidden = 2 * self.config.num_channels
        weights = self._lstm_weights(block.band_lstm, ["", "_reverse"])
        outputs, _, _ = self._lstm(self._op("Transpose", x, perm=[1, 0, 2]), weights, hidden, "bidirectional")
        outputs = self._op("Transpose", outputs, perm=[2, 0, 1, 3])  # (K, 2, B, H) → (B, K, 2, H)
        outputs = self._reshape(outputs, self.num_streams, -1, 2 * hidden)
        return self._op("Add", x, self._linear(outputs, block.band_linear))

    def _mask_decoder(self, x: str) -> tuple[str, str]:
        decoder, bands, channels = self.model.mask_decoder, self.config.num_bands, self.config.num_channels
        weight = decoder.expand.weight.unflatten(0, (bands, 2)).transpose(1, 2).flatten(2)  # (K, C, 2·4C)
        hidden = self._op("MatMul", self._op("Transpose", x, perm=[1, 0, 2]), self._weight(weight))
        hidden = self._op("Tanh", self._op("Add", hidden, self._weight(decoder.expand.bias.view(bands, 1, -1))))
        hidden = self._op(
            "Transpose", self._reshape(hidden, bands, self.num_streams, 2, 4 * channels), perm=[0, 2, 1, 3]
        )
        parts = self._split(hidden, [group.num_bands for group in decoder.groups], axis=0)
        spectra = []
        for group, linear, part in zip(decoder.groups, decoder.outputs, parts, strict=True):
            part = self._bandwise(self._reshape(part, 2 * group.num_bands, self.num_streams, 4 * channels), linear)
            value, gate = self._split(part, 2, axis=2)
            part = self._op("Mul", value, self._op("Sigmoid", gate))
            part = self._reshape(part, group.num_bands, 2, self.num_streams, 2 * group.width)
            part = self._op("Transpose", part, perm=[1, 2, 0, 3])
            spectra.append(self._reshape(part, 2, self.num_streams, group.num_bins, 2))
        joined = self._op("Concat", *spectra, axis=2) if len(spectra) > 1 else spectra[0]
        shape = (self.num_streams, self.config.num_bins, 2)
        mask, residual = (self._reshape(part, *shape) for part in self._split(joined, 2, axis=0))
        return mask, residual

    # --- operations ------------------------------------------------------------------------

    def _op(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        name = name or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def _weight(self, values: Tensor | np.ndarray) -> str:
        array = values.detach().numpy() if isinstance(values, Tensor) else values
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _shape(self) -> tuple[int, int, int]:
        return self.num_streams, self.config.num_bands, self.config.num_channels

    def _reshape(self, x: str, *shape: int) -> str:
        return self._op("Reshape", x, self._weight(np.asarray(shape, np.int64)))

    def _split(self, x: str, parts: int | list[int], axis: int) -> list[str]:
        """Into so many equal parts, or parts of these lengths."""
        count = parts if isinstance(parts, int) else len(parts)
        names = [f"v{len(self.nodes)}_{index}" for index in range(count)]
        if count == 1:
            return [x]
        sizes = [] if isinstance(parts, int) else [self._weight(np.asarray(parts, np.int64))]
        self.nodes.append(helper.make_node("Split", [x, *sizes], names, axis=axis))
        return names

    def _linear(self, x: str, linear: nn.Linear) -> str:
        return self._op("Add", self._op("MatMul", x, self._weight(linear.weight.T)), self._weight(linear.bias))

    def _bandwise(self, x: str, linear: nn.Module) -> str:
        assert isinstance(linear, BandwiseLinear)
        product = self._op("MatMul", x, self._weight(linear.weight))
        return self._op("Add", product, self._weight(linear.bias.unsqueeze(1)))

    def _lstm_weights(self, lstm: nn.LSTM, directions: list[str]) -> list[str]:
        """W, R and B of ONNX's operator, a leading axis over directions."""

        def gates(name: str, direction: str) -> Tensor:
            weight = getattr(lstm, f"{name}_l0{direction}")
            return weight.unflatten(0, (4, -1))[GATES].flatten(0, 1)

        matrices = [torch.stack([gates(name, d) for d in directions]) for name in ("weight_ih", "weight_hh")]
        bias = torch.stack([torch.cat([gates("bias_ih", d), gates("bias_hh", d)]) for d in directions])
        return [self._weight(tensor) for tensor in (*matrices, bias)]

    def _lstm(self, x: str, weights: list[str], hidden: int, direction: str, *states: str) -> tuple[str, str, str]:
        """(outputs, last hidden, last cell) of rows (step, row, feature)."""
        names = [f"v{len(self.nodes)}_{part}" for part in ("outputs", "hidden", "cell")]
        inputs = [x, *weights, "", *states] if states else [x, *weights]
        self.nodes.append(helper.make_node("LSTM", inputs, names, hidden_size=hidden, direction=direction))
        return names[0], names[1], names[2]

    def _powered(self, spectrum: str, exponent: float, floor: float | None = None, name: str | None = None) -> str:
        """Every bin times a power of its magnitude."""
        magnitude = self._op("ReduceL2", spectrum, axes=[-1], keepdims=1)
        if floor is not None:
            magnitude = self._op("Max", magnitude, self._weight(np.asarray(floor, np.float32)))
        gain = self._op("Pow", magnitude, self._weight(np.asarray(exponent, np.float32)))
        return self._op("Mul", spectrum, gain, name=name)

    def _complex_product(self, a: str, b: str) -> str:
        (ar, ai), (br, bi) = self._split(a, 2, axis=2), self._split(b, 2, axis=2)
        real = self._op("Sub", self._op("Mul", ar, br), self._op("Mul", ai, bi))
        imaginary = self._op("Add", self._op("Mul", ar, bi), self._op("Mul", ai, br))
        return self._op("Concat", real, imaginary, axis=2)


def _tensor(name: str, shape: list[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def main(words: list[str]) -> int:
    (checkpoint, output), given = settings(words, ["CHECKPOINT", "OUTPUT.onnx"], {"streams": int})
    num_streams = given.get("streams", 1)
    if num_streams < 1:
        raise ValueError(f"streams = {num_streams}: expected at least 1")
    model, target = load_model(Path(checkpoint)), Path(output)
    if target.exists() and target.samefile(model_path(Path(checkpoint))):
        raise ValueError(f"{target} is the input: give the output another name")
    exported = export(model, num_streams)
    difference = largest_difference(model, exported, num_frames=20)
    if difference > 1e-5:
        raise ValueError(f"onnxruntime's output differs from torch's by {difference:.1e}: nothing was written")
    with whole_file(target) as temporary:
        onnx.save(exported, temporary)
    print(f"{output}: step of {num_streams} streams; 20 frames through onnxruntime equal torch's to {difference:.1e}")
    return 0


if __name__ == "__main__":
    run_main(main, __doc__ or "")
