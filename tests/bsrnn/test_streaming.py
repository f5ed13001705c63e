"""A stream gives what the whole file gives, however it is cut, and goes on where it was saved."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bsrnn import BSRNN, BSRNNConfig, compiled
from bsrnn.folding import fold
from bsrnn.kernel import PACKED_FROM, FrameKernel
from bsrnn.streaming import Stream
from tests.bsrnn.frame_step import enhance_frame
from tests.bsrnn.test_model import trained_like

KERNELS = pytest.mark.parametrize("use_kernel", [True, False], ids=["kernel", "torch"])


@pytest.fixture(scope="module")
def model() -> BSRNN:
    return trained_like(BSRNNConfig(16, 2))


def noise(num_streams: int, num_samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(num_streams, num_samples, generator=torch.Generator().manual_seed(num_samples))


def chunks_of(signal: torch.Tensor, largest: int) -> list[torch.Tensor]:
    """The signal cut at random, into chunks of 0 to `largest` samples."""
    generator = torch.Generator().manual_seed(largest)
    sizes, left = [], signal.shape[1]
    while left:
        sizes.append(min(left, int(torch.randint(0, largest + 1, (), generator=generator))))
        left -= sizes[-1]
    return list(signal.split(sizes, dim=1))


def whole_file(model: BSRNN, signal: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(signal).waveform


def assert_equal(streamed: torch.Tensor, whole: torch.Tensor) -> None:
    assert streamed.shape == whole.shape
    assert float((streamed - whole).abs().max()) <= 1e-5 * float(whole.abs().max())


@KERNELS
@pytest.mark.parametrize("largest", [100, 700, 5_000])
@pytest.mark.parametrize("num_samples", [1, 256, 257, 511, 512, 9_000])
def test_chunks_of_any_length_give_the_whole_files_output_with_its_edges(
    model: BSRNN, use_kernel: bool, largest: int, num_samples: int
):
    signal = noise(2, num_samples)
    stream = Stream(model, 2, use_kernel)
    parts = [stream.process(chunk) for chunk in chunks_of(signal, largest)]
    assert_equal(torch.cat([*parts, stream.flush()], dim=1), whole_file(model, signal))


@pytest.mark.parametrize("channels", [2, 8, 16, 24, 40])
def test_long_chunks_through_torch_and_short_ones_through_the_kernel_go_on_from_each_other(
    channels: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("bsrnn.streaming.KERNEL_WORK", 0)
    monkeypatch.setattr("bsrnn.streaming.KERNEL_FRAMES", 3)
    model = trained_like(BSRNNConfig(channels, 2))
    signal = noise(2, 9_000)
    stream = Stream(model, 2, use_kernel=True)
    parts = [stream.process(chunk) for chunk in chunks_of(signal, 2_000)]
    assert_equal(torch.cat([*parts, stream.flush()], dim=1), whole_file(model, signal))


@KERNELS
@pytest.mark.parametrize("n_fft", [2, 4, 6, 22, 320, 510, 960])  # of factors 4, 2, 3, 5, 11 and 17
@pytest.mark.parametrize("overlap", [0.2, 0.5, 0.75])
def test_windows_of_any_length_and_hop_stream(n_fft: int, overlap: float, use_kernel: bool):
    hop = n_fft - max(1, int(overlap * n_fft))
    config = BSRNNConfig(8, 1, n_fft=n_fft, hop_length=hop, band_widths=(1, n_fft // 2))
    model = trained_like(config)
    signal = noise(2, 4 * n_fft + 3)
    stream = Stream(model, 2, use_kernel)
    parts = [stream.process(chunk) for chunk in chunks_of(signal, n_fft)]
    assert_equal(torch.cat([*parts, stream.flush()], dim=1), whole_file(model, signal))


def test_a_model_in_64_bits_streams_in_64_bits(model: BSRNN):
    double = copy.deepcopy(model).double()
    assert "torch.float64" in str(FrameKernel.obstacle(fold(double)))
    signal = noise(1, 2_000).double()
    stream = Stream(double)
    enhanced = torch.cat([stream.process(signal), stream.flush()], dim=1)
    assert enhanced.dtype == torch.float64
    assert_equal(enhanced.float(), whole_file(model, signal.float()))


def test_a_sample_is_returned_at_most_one_window_after_it_came(model: BSRNN):
    stream, returned, longest = Stream(model), 0, 0
    for index, sample in enumerate(noise(1, 2_000).split(1, dim=1)):
        returned += stream.process(sample).shape[1]
        longest = max(longest, index + 1 - returned)
    assert longest == model.config.n_fft - 1  # with the window's last sample its first hop is out


@KERNELS
@pytest.mark.parametrize("channels", [16, 24])
def test_a_stream_saved_to_a_file_and_restored_goes_on_as_if_nothing_had_been(channels: int, use_kernel: bool):
    model = trained_like(BSRNNConfig(channels, 2))
    signal = noise(3, 6_000)
    stream = Stream(model, 3, use_kernel)
    parts = [stream.process(chunk) for chunk in signal[:, :3_333].split(400, dim=1)]
    file = io.BytesIO()
    torch.save(stream.state_dict(), file)
    stream.process(noise(3, 1_000))  # what the saved state must not see
    file.seek(0)
    states = torch.load(file, weights_only=True)["states"]
    assert [part.shape for part in states[0]] == [(1, 3 * 31, 2 * channels)] * 2  # of the model's width
    file.seek(0)
    restored = Stream(model, 3, use_kernel)
    restored.process(noise(3, 2_000))  # nor what was before in the stream that takes it
    restored.load_state_dict(torch.load(file, weights_only=True))
    parts += [restored.process(chunk) for chunk in signal[:, 3_333:].split(400, dim=1)]
    assert_equal(torch.cat([*parts, restored.flush()], dim=1), whole_file(model, signal))


@pytest.mark.parametrize(
    ("changes", "num_streams", "said"),
    [
        ({}, 2, "num_streams = 2: expected 1"),
        ({"norm": "batch"}, 1, "norm = batch: expected cumulative"),
        ({"num_channels": 24}, 1, "num_channels = 24: expected 16"),
        ({"num_layers": 1}, 1, "num_layers = 1: expected 2"),
        ({"band_widths": (57, 200)}, 1, r"band_widths = \(57, 200\): expected \(100, 157\)"),
        ({"band_widths": (57, 100, 100)}, 1, r"band_widths = \(57, 100, 100\): expected \(100, 157\)"),
        ({"compression": 0.5}, 1, "compression = 0.5: expected 0.3"),
    ],
)
def test_a_state_of_another_stream_is_refused_by_what_differs(changes: dict, num_streams: int, said: str):
    config = BSRNNConfig(16, 2, norm="cumulative", band_widths=(100, 157))
    other = Stream(BSRNN(replace(config, **changes)), num_streams)
    for num_samples in (0, 2_000):
        other.process(noise(num_streams, num_samples))
        with pytest.raises(ValueError, match=f"this state is of another stream, {said}"):
            Stream(BSRNN(config)).load_state_dict(other.state_dict())


def test_a_state_of_another_precision_is_refused(model: BSRNN):
    with pytest.raises(ValueError, match=r"precision = torch.float64: expected torch.float32"):
        Stream(model).load_state_dict(Stream(copy.deepcopy(model).double()).state_dict())


def test_a_restored_state_is_the_saved_one_to_the_last_bit():
    """A cumulative norm's sums of 64 bits too. The size of a training batch makes no other model."""
    config = BSRNNConfig(16, 1, norm="cumulative")
    torch.manual_seed(0)
    stream = Stream(BSRNN(config))
    stream.process(noise(1, 5_000))
    restored = Stream(BSRNN(replace(config, norm_batch=8)))
    saved = stream.state_dict()
    restored.load_state_dict(saved)
    again = restored.state_dict()
    assert again.pop("identity") == saved.pop("identity")
    torch.testing.assert_close(again, saved, rtol=0, atol=0)


@pytest.mark.parametrize(("norm", "causal"), [("group", True), ("group", False), ("batch", False)])
def test_a_model_that_does_not_stream_is_refused_before_it_hears_anything(norm: str, causal: bool):
    model = BSRNN(BSRNNConfig(16, 1, norm=norm, causal=causal))
    with pytest.raises(ValueError, match=f"norm = {norm}, causal = {causal}: enhances whole recordings"):
        Stream(model)


def test_streams_of_a_batch_do_not_hear_each_other(model: BSRNN):
    signal = noise(3, 4_000)
    batch = Stream(model, 3)
    together = torch.cat([batch.process(signal), batch.flush()], dim=1)
    for index in range(3):
        alone = Stream(model)
        assert_equal(
            together[index : index + 1], torch.cat([alone.process(signal[index : index + 1]), alone.flush()], 1)
        )


def test_after_a_flush_a_new_signal_begins(model: BSRNN):
    stream = Stream(model)
    for num_samples in (3_000, 1_700):
        signal = noise(1, num_samples)
        assert_equal(torch.cat([stream.process(signal), stream.flush()], dim=1), whole_file(model, signal))


def test_a_chunk_of_another_shape_is_refused(model: BSRNN):
    stream = Stream(model)
    with pytest.raises(ValueError, match=r"expected \(1, samples\)"):
        stream.process(noise(2, 10))


@torch.inference_mode()
@pytest.mark.parametrize("num_streams", [1, 2, 5, 8])
@pytest.mark.parametrize("channels", [2, 8, 16, 24, 40, 48])
@pytest.mark.parametrize("packed_from", [PACKED_FROM, 0], ids=["as it is", "packed"])
def test_the_compiled_kernel_equals_torch_frame_by_frame(
    channels: int, num_streams: int, packed_from: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("bsrnn.kernel.PACKED_FROM", packed_from)
    assert_the_kernel_equals_torch(channels, num_streams)


def assert_the_kernel_equals_torch(channels: int, num_streams: int) -> None:
    model = trained_like(BSRNNConfig(channels, 2))
    kernel = FrameKernel(fold(model), num_streams)
    states = kernel.initial_states()
    by_torch = Stream(model, num_streams, use_kernel=False)
    for scale in (1.0, 1e-3, 30.0, 0.0, 1.0, 1.0):  # silence too
        spectrum = scale * torch.randn(num_streams, 257, dtype=torch.complex64)
        expected = by_torch._enhance(spectrum.unsqueeze(1)).squeeze(1)
        assert_equal(torch.view_as_real(enhance_frame(kernel, spectrum, states)), torch.view_as_real(expected))
    assert by_torch._states is not None
    for ours, theirs in zip(states, by_torch._states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@KERNELS
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))])
@pytest.mark.parametrize("channels", [16, 24])
def test_a_copy_of_a_stream_goes_on_by_itself(channels: int, copied: Callable[[Stream], Stream], use_kernel: bool):
    model = trained_like(BSRNNConfig(channels, 2))
    signal = noise(2, 3_000)
    stream = Stream(model, 2, use_kernel)
    first = stream.process(signal[:, :1_000])
    other = copied(stream)
    assert (other._kernel is not None) == use_kernel
    for one in (stream, other):
        parts = [one.process(chunk) for chunk in signal[:, 1_000:].split(300, dim=1)]
        assert_equal(torch.cat([first, *parts, one.flush()], dim=1), whole_file(model, signal))


def test_a_copy_runs_through_torch_where_there_is_no_compiler(model: BSRNN, monkeypatch: pytest.MonkeyPatch):
    signal = noise(1, 2_000)
    here, demanded = (pickle.dumps(Stream(model, use_kernel=use_kernel)) for use_kernel in (None, True))
    monkeypatch.setenv("CC", "no-such-compiler")
    compiled._made.cache_clear()
    try:
        stream = pickle.loads(here)
        parts = [stream.process(chunk) for chunk in signal.split(256, dim=1)]
        assert_equal(torch.cat([*parts, stream.flush()], dim=1), whole_file(model, signal))
        with pytest.raises(ValueError, match="no kernel for this model"):
            pickle.loads(demanded)
    finally:
        compiled._made.cache_clear()


@pytest.mark.parametrize("default", ["64 bits", "another device"])
def test_a_stream_is_in_32_bits_on_the_cpu_whatever_torchs_defaults_are(model: BSRNN, default: str):
    signal = noise(1, 2_000)
    expected = whole_file(model, signal)
    try:
        if default == "64 bits":
            torch.set_default_dtype(torch.float64)
        else:
            torch.set_default_device("meta")
        stream = Stream(model, use_kernel=True)
        assert stream._kernel is not None
        states = [part for state in stream._kernel.initial_states() for part in state]
        assert {(part.dtype, part.device.type) for part in states} == {(torch.float32, "cpu")}
        enhanced = torch.cat([*map(stream.process, signal.split(256, dim=1)), stream.flush()], dim=1)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert enhanced.dtype == torch.float32
    assert_equal(enhanced, expected)


@torch.inference_mode()
@pytest.mark.parametrize("channels", [16, 24])
def test_new_states_in_a_list_that_the_kernel_has_seen_are_the_ones_it_renews(channels: int):
    kernel = FrameKernel(fold(BSRNN(BSRNNConfig(channels, 1))), 1)
    spectrum, states = torch.randn(1, 257, dtype=torch.complex64), kernel.initial_states()
    first, _ = enhance_frame(kernel, spectrum, states), enhance_frame(kernel, spectrum, states)
    states[:] = kernel.initial_states()
    assert torch.equal(enhance_frame(kernel, spectrum, states), first)
    assert all(part.any() for part in states[0])


@torch.inference_mode()
def test_conjugate_spectra_are_enhanced_as_what_they_stand_for():
    kernel = FrameKernel(fold(BSRNN(BSRNNConfig(16, 1))), 1)
    spectra = torch.randn(1, 2, 257, dtype=torch.complex64).conj()
    by_bit, by_value = (
        kernel.hops(given, kernel.initial_states(), torch.zeros(1, 256), torch.ones(256))
        for given in (spectra, spectra.resolve_conj())
    )
    assert torch.equal(by_bit, by_value)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        # jaxtyping, which only tests have, sees that sizes of the same name differ
        ("spectra", {"spectra": torch.zeros(2, 1, 257, dtype=torch.complex64), "overlap": torch.zeros(2, 256)}),
        ("spectra", {"spectra": torch.zeros(1, 1, 256, dtype=torch.complex64)}),
        ("spectra", {"spectra": torch.zeros(1, 1, 257, dtype=torch.complex128)}),
        ("overlap", {"overlap": torch.zeros(1, 255), "envelope": torch.zeros(255)}),
        ("overlap", {"overlap": torch.zeros(1, 256, dtype=torch.float64)}),
        ("envelope", {"envelope": torch.zeros(256, dtype=torch.float64)}),
        ("envelope", {"envelope": torch.zeros(512)[::2]}),
        ("states", {"states": []}),
        ("states", {"states": [(torch.zeros(1, 31, 32), torch.zeros(1, 30, 32))]}),
        ("states", {"states": [(torch.zeros(1, 31, 32, dtype=torch.float64), torch.zeros(1, 31, 32))]}),
    ],
)
def test_the_kernel_refuses_what_is_of_another_shape_or_kind(name: str, given: dict):
    kernel = FrameKernel(fold(BSRNN(BSRNNConfig(16, 1))), 1)
    whole = {
        "spectra": torch.zeros(1, 1, 257, dtype=torch.complex64),
        "states": kernel.initial_states(),
        "overlap": torch.zeros(1, 256),
        "envelope": torch.zeros(256),
    }
    assert kernel.hops(**whole).shape == (1, 256)
    with pytest.raises(ValueError, match=rf"{name.rstrip('s')}.*: expected "):
        kernel.hops(**whole | given)


def test_what_is_no_stream_of_floats_is_refused(model: BSRNN):
    with pytest.raises(ValueError, match=r"a chunk of torch.int16: expected floats, full scale ±1"):
        Stream(model).process(torch.zeros(1, 10, dtype=torch.int16))
    with pytest.raises(ValueError, match="num_streams = 0: expected at least 1"):
        Stream(model, 0)


def test_without_a_c_compiler_a_stream_runs_through_torch(
    model: BSRNN, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
):
    monkeypatch.setenv("CC", "no-such-compiler")
    compiled._made.cache_clear()
    try:
        assert "no-such-compiler" in str(FrameKernel.obstacle(fold(model)))
        with pytest.raises(ValueError, match="no kernel for this model"):
            Stream(model, use_kernel=True)
        signal = noise(1, 2_000)
        stream = Stream(model)
        parts = [stream.process(chunk) for chunk in signal.split(256, dim=1)]
        assert_equal(torch.cat([*parts, stream.flush()], dim=1), whole_file(model, signal))
    finally:
        compiled._made.cache_clear()


def test_the_kernel_takes_no_model_that_it_does_not_know():
    cumulative = BSRNN(BSRNNConfig(16, 1, norm="cumulative"))
    odd = BSRNN(BSRNNConfig(16, 1, n_fft=511, hop_length=255, band_widths=(100, 156)))
    for unknown in (BSRNN(BSRNNConfig(16, 1)), fold(cumulative)):
        assert "not folded" in str(FrameKernel.obstacle(unknown))
    assert "n_fft = 511 is odd" in str(FrameKernel.obstacle(fold(odd)))
    for model in (cumulative, odd):
        Stream(model).process(noise(1, 2_000))  # torch does it
