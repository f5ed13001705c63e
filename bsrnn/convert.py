"""Checkpoints of the FastEnhancer repository's BSRNN to models of this project, and back.

    python -m bsrnn.convert FILE.pth [MODEL.pt]      # theirs to ours; default: FILE.pt beside it
    python -m bsrnn.convert MODEL.pt FILE.pth        # ours, or a run's directory, to theirs, which may not be named .pt

The outputs are the same. Theirs (github.com/aask1357/fastenhancer, arXiv 2509.21867) has a module
for each band, here bands of one width are one tensor (bsrnn/bands.py):

    theirs                                       ours
    band_split.norm.K, band_split.fc.K           band_split.norm, band_split.linears.GROUP
    norm_time.L, rnn_time.L, fc_time.L           blocks.L.time_norm, .time_lstm, .time_linear
    norm_freq.L, rnn_freq.L, fc_freq.L           blocks.L.band_norm, .band_lstm, .band_linear
    mask_decoder.mlp_mask.K.0, mlp_residual.K.0  mask_decoder.norm with .scale and .shift of each head
    mask_decoder.mlp_mask.K.1, ...               mask_decoder.expand
    mask_decoder.mlp_mask.K.3, ...               mask_decoder.outputs.GROUP

Their 1x1 convolutions are (out, in, 1), ours (in, out). Each of their heads has running statistics of
its own; ours share one, and where a head's differ its scale and shift make up for it. A checkpoint holds {"model":
state dict, ...}; its optimiser is not converted. It says neither compression nor hop: 0.3 and half a window, as there.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bsrnn.bands import BandGroup, group_bands
from bsrnn.command import run_main, settings
from bsrnn.model import BSRNN, BSRNNConfig
from bsrnn.modelfile import is_model, load_model, model_path, read_content, save_model, write_whole

State = dict[str, Tensor]
HEADS = ("mask_decoder.mlp_mask", "mask_decoder.mlp_residual")
EPSILON = 1e-5  # of both batch normalisations
STATISTICS = ("running_mean", "running_var")
BLOCK_PARTS = {
    "norm_time": "time_norm",
    "rnn_time": "time_lstm",
    "fc_time": "time_linear",
    "norm_freq": "band_norm",
    "rnn_freq": "band_lstm",
    "fc_freq": "band_linear",
}


def from_reference(state: State) -> BSRNN:
    """A model of this project from a state dict of theirs; ValueError if it is not one of an unfused BSRNN."""
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    try:
        config = _config_of(state)
        ours = _our_state(state, config)
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing: not the state of a BSRNN before its norms are fused") from None
    model = BSRNN(config)
    expected = {name for name in to_reference(model) if not name.endswith("num_batches_tracked")}
    if missing := sorted(expected - set(state)):
        raise ValueError(f"{missing[0]} is missing ({len(missing)} in all): not a whole BSRNN")
    if unknown := sorted(set(state) - expected):
        raise ValueError(f"{unknown[0]}: no such weight in a BSRNN ({len(unknown)} unknown in all)")
    try:
        model.load_state_dict(ours)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None
    return model.eval()


def to_reference(model: BSRNN) -> State:
    """The state dict of theirs that makes the same of a signal; ValueError for a model that is folded or a variant."""
    ours, config = model.state_dict(), model.config
    if "mask_decoder.norm.running_mean" not in ours:
        raise ValueError(
            "this model has no batch normalisation (it is folded, or a variant), which the FastEnhancer format requires"
        )
    if not config.causal or config.compression != 0.3 or 2 * config.hop_length != config.n_fft:
        raise ValueError(
            f"causal = {config.causal}, compression = {config.compression}, hop_length = {config.hop_length}: theirs "
            f"is causal, with compression 0.3 and a hop of half a window, {config.n_fft // 2}, and nothing else"
        )
    theirs: State = {}
    for group, index, k in _bands(config):
        features = slice(2 * (group.first_bin + k * group.width), 2 * (group.first_bin + (k + 1) * group.width))
        band = group.first_band + k
        for part in ("weight", "bias", *STATISTICS):
            theirs[f"band_split.norm.{band}.{part}"] = ours[f"band_split.norm.{part}"][features]
        theirs |= _convolution(f"band_split.fc.{band}", ours, f"band_split.linears.{index}", k)
        channels = slice(band * config.num_channels, (band + 1) * config.num_channels)
        for number, head in enumerate(HEADS):
            norm = f"{head}.{band}.0"
            theirs[f"{norm}.weight"] = ours["mask_decoder.scale"][band, number]
            theirs[f"{norm}.bias"] = ours["mask_decoder.shift"][band, number]
            for part in STATISTICS:
                theirs[f"{norm}.{part}"] = ours[f"mask_decoder.norm.{part}"][channels]
            theirs |= _convolution(f"{head}.{band}.1", ours, "mask_decoder.expand", 2 * band + number)
            theirs |= _convolution(f"{head}.{band}.3", ours, f"mask_decoder.outputs.{index}", 2 * k + number)
    for layer in range(config.num_layers):
        for their_part, our_part in BLOCK_PARTS.items():
            prefix = f"blocks.{layer}.{our_part}."
            for name in (name for name in ours if name.startswith(prefix)):
                theirs[f"{their_part}.{layer}.{name.removeprefix(prefix)}"] = ours[name]
    tracked = [name.replace("running_mean", "num_batches_tracked") for name in theirs if name.endswith("running_mean")]
    copied = {name: tensor.detach().clone().contiguous() for name, tensor in theirs.items()}
    return copied | {name: torch.zeros((), dtype=torch.long) for name in tracked}


def _config_of(state: State) -> BSRNNConfig:
    num_bands = 1 + max((int(name.split(".")[2]) for name in state if name.startswith("band_split.fc.")), default=-1)
    num_layers = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("rnn_time.")), default=-1)
    if not num_bands or not num_layers:
        raise ValueError("no weights of band_split.fc or rnn_time: not the state of a BSRNN")
    weights = [state[f"band_split.fc.{band}.weight"] for band in range(num_bands)]  # (C, 2·width, 1)
    widths = tuple(weight.shape[1] // 2 for weight in weights)
    n_fft = 2 * (sum(widths) - 1)
    return BSRNNConfig(weights[0].shape[0], num_layers, n_fft=n_fft, hop_length=n_fft // 2, band_widths=widths)


def _our_state(theirs: State, config: BSRNNConfig) -> State:
    bands = range(config.num_bands)
    ours: State = {}
    for part in ("weight", "bias", *STATISTICS):
        ours[f"band_split.norm.{part}"] = torch.cat([theirs[f"band_split.norm.{band}.{part}"] for band in bands])
    expand: list[tuple[Tensor, Tensor]] = []
    scales, shifts = [], []
    for band in bands:
        shared = [theirs[f"{HEADS[0]}.{band}.0.{part}"] for part in STATISTICS]
        for head in HEADS:
            scale, shift = _onto(shared, theirs, f"{head}.{band}.0")
            scales.append(scale)
            shifts.append(shift)
            expand.append(_linear(theirs, f"{head}.{band}.1"))
    ours["mask_decoder.scale"] = torch.stack(scales).unflatten(0, (-1, 2))  # (K, 2, C)
    ours["mask_decoder.shift"] = torch.stack(shifts).unflatten(0, (-1, 2))
    for part in STATISTICS:
        ours[f"mask_decoder.norm.{part}"] = torch.cat([theirs[f"{HEADS[0]}.{band}.0.{part}"] for band in bands])
    ours |= _stacked("mask_decoder.expand", expand)
    for index, group in enumerate(group_bands(config.band_widths)):
        members = range(group.first_band, group.first_band + group.num_bands)
        split = [_linear(theirs, f"band_split.fc.{band}") for band in members]
        outputs = [_linear(theirs, f"{head}.{band}.3") for band in members for head in HEADS]
        ours |= _stacked(f"band_split.linears.{index}", split) | _stacked(f"mask_decoder.outputs.{index}", outputs)
    for name, tensor in theirs.items():
        part, _, rest = name.partition(".")
        if part in BLOCK_PARTS:
            layer, _, rest = rest.partition(".")
            ours[f"blocks.{layer}.{BLOCK_PARTS[part]}.{rest}"] = tensor
    return ours


def _onto(shared: list[Tensor], theirs: State, norm: str) -> tuple[Tensor, Tensor]:
    """(scale, shift) that make of the shared statistics what a head's own norm makes of its own."""
    (mean, var), (own_mean, own_var) = shared, (theirs[f"{norm}.{part}"] for part in STATISTICS)
    weight, bias = theirs[f"{norm}.weight"], theirs[f"{norm}.bias"]
    if torch.equal(mean, own_mean) and torch.equal(var, own_var):
        return weight, bias
    own_scale = weight / (own_var + EPSILON).sqrt()
    return own_scale * (var + EPSILON).sqrt(), bias + own_scale * (mean - own_mean)


def _bands(config: BSRNNConfig) -> list[tuple[BandGroup, int, int]]:
    """(group, its index, place in the group) of each band."""
    return [
        (group, index, k) for index, group in enumerate(group_bands(config.band_widths)) for k in range(group.num_bands)
    ]


def _linear(theirs: State, convolution: str) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution (out, in, 1) as ((in, out), (out))."""
    return theirs[f"{convolution}.weight"].squeeze(-1).T, theirs[f"{convolution}.bias"]


def _stacked(name: str, linears: list[tuple[Tensor, Tensor]]) -> State:
    weights, biases = zip(*linears, strict=True)
    return {f"{name}.weight": torch.stack(weights), f"{name}.bias": torch.stack(biases)}


def _convolution(theirs: str, ours: State, name: str, index: int) -> State:
    return {
        f"{theirs}.weight": ours[f"{name}.weight"][index].T.unsqueeze(-1),
        f"{theirs}.bias": ours[f"{name}.bias"][index],
    }


def main(words: list[str]) -> int:
    (source, *rest), _ = settings(words, ["FILE.pth", "[MODEL.pt]"], {})
    path = Path(source)
    content = {} if path.is_dir() else read_content(path)
    is_ours = path.is_dir() or is_model(content)
    if is_ours and not rest:
        raise ValueError(f"{source} is a model of this project: name the file to write too, FILE.pth")
    target = Path(rest[0]) if rest else path.with_suffix(".pt")
    if target.exists() and target.samefile(model_path(path)):
        raise ValueError(f"{target} is the input: give the output another name")
    if is_ours and target.suffix == ".pt":
        raise ValueError(
            f"{target}: a model of this project is written as a checkpoint of the FastEnhancer repository, "
            f"but .pt is the ending of this project's models: name it {target.with_suffix('.pth').name}"
        )
    if is_ours:
        model = load_model(path)
        write_whole(target, {"model": to_reference(model)})
    else:
        state = content.get("model") if isinstance(content, dict) else None
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"{source} holds no state dict under 'model': give a checkpoint of that repository")
        try:
            model = from_reference(state)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        save_model(model, target)
    config = model.config
    kind = "a checkpoint of the FastEnhancer repository" if is_ours else "a model of this project"
    print(f"{target}: {kind}, {config.num_channels} channels, {config.num_layers} layers, {config.num_bands} bands")
    return 0


if __name__ == "__main__":
    run_main(main, __doc__ or "")
