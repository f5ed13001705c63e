"""The compiled LSTM against the library's, and both against 64 bits."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from torch.testing._internal.two_tensor import TwoTensor

from bsrnn import BSRNN, BSRNNConfig, compiled
from bsrnn import lstm as lstm_module
from bsrnn.lstm import LARGEST_HIDDEN, LSTM
from tests.bsrnn.library_lstm import by_library

PARTS = ["outputs", "last outputs", "last cells", "x", "h0", "c0", "ih", "hh", "bias ih", "bias hh"]


def all_of(network: nn.LSTM, x: Tensor, states: tuple[Tensor, Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Outputs, states, and the gradients of inputs, states and parameters, of a weighted sum of what comes out."""
    x, h0, c0 = (part.detach().clone().requires_grad_() for part in (x, *states))
    outputs, (hidden, cell) = network(x, (h0, c0))
    made = [outputs, hidden, cell]
    leaves = [x, h0, c0, *network.parameters()]
    total = sum((part * weight).sum() for part, weight in zip(made, weights, strict=True))
    return [part.detach() for part in made] + list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("rows_first", [False, True], ids=["steps first", "rows first"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize(("inputs", "hidden"), [(2, 4), (16, 32), (5, 20), (32, 64), (64, 128)])
@pytest.mark.parametrize(("steps", "rows"), [(1, 1), (9, 7), (3, 100), (31, 13)])
def test_outputs_states_and_gradients_are_those_of_64_bits(
    inputs: int, hidden: int, steps: int, rows: int, bidirectional: bool, rows_first: bool
):
    assert_those_of_64_bits(inputs, hidden, steps, rows, bidirectional, rows_first)


def assert_those_of_64_bits(
    inputs: int, hidden: int, steps: int, rows: int, bidirectional: bool, rows_first: bool
) -> None:
    torch.manual_seed(0)
    ours = LSTM(inputs, hidden, bidirectional=bidirectional, batch_first=rows_first)
    directions = 1 + bidirectional
    x = torch.randn((rows, steps, inputs) if rows_first else (steps, rows, inputs))
    assert ours.obstacle(x) is None
    h0, c0, of_hidden, of_cell = torch.randn(4, directions, rows, hidden)
    weights = [torch.randn(*x.shape[:2], directions * hidden), of_hidden, of_cell]
    precise = copy.deepcopy(ours).double()
    found = all_of(ours, x, (h0, c0), weights)
    expected = all_of(precise, x.double(), (h0.double(), c0.double()), [weight.double() for weight in weights])
    for name, one, other in zip(PARTS, found, expected, strict=False):
        difference = float((one - other).abs().max() / other.abs().max())
        assert difference < 1e-5, f"{name}: {difference:.1e} of the largest"
    with torch.no_grad():  # and without keeping what a backward pass needs
        outputs, (hidden_state, cell_state) = ours(x, (h0, c0))
    for one, other in zip((outputs, hidden_state, cell_state), found, strict=False):
        assert torch.equal(one, other)
    silent, _ = ours(x)
    torch.testing.assert_close(silent, ours(x, (torch.zeros_like(h0), torch.zeros_like(c0)))[0])


def test_any_number_of_threads_gives_the_same_outputs_and_each_the_same_gradients_again():
    torch.manual_seed(0)
    ours = LSTM(16, 32, bidirectional=True, batch_first=True)
    x, states = torch.randn(50, 31, 16), (torch.zeros(2, 50, 32), torch.zeros(2, 50, 32))
    weights = [torch.randn(50, 31, 64), torch.randn(2, 50, 32), torch.randn(2, 50, 32)]
    threads, by_threads = torch.get_num_threads(), {}
    try:
        for number in (1, 2, 3, 16):
            torch.set_num_threads(number)
            by_threads[number] = all_of(ours, x, states, weights)
            for one, other in zip(by_threads[number], all_of(ours, x, states, weights), strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)
    for found in by_threads.values():
        for one, other in zip(found[:3], by_threads[1][:3], strict=True):
            assert torch.equal(one, other)
        for one, other in zip(found, by_threads[1], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e3, 1e30])
def test_gates_far_beyond_saturation_stay_finite_and_are_the_librarys(scale: float):
    torch.manual_seed(0)
    ours, x = LSTM(4, 16), scale * torch.randn(5, 3, 4)
    states, weights = (torch.zeros(1, 3, 16), torch.zeros(1, 3, 16)), [torch.ones(5, 3, 16), *torch.ones(2, 1, 3, 16)]
    found = all_of(ours, x, states, weights)
    with by_library():
        expected = all_of(ours, x, states, weights)
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max()) + 1e-6


def test_what_is_no_number_stays_none():
    ours, x = LSTM(4, 16), torch.randn(5, 3, 4)
    x[2, 1, 0] = torch.nan
    outputs, _ = ours(x)
    assert outputs[2:, 1].isnan().all()
    assert outputs[:2].isfinite().all()
    assert outputs[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("hidden", [16, 20])  # 20 are filled up to whole vectors
def test_an_infinite_input_makes_only_its_own_weights_gradients_none(hidden: int):
    torch.manual_seed(0)
    ours, x = LSTM(4, hidden), torch.randn(5, 6, 4)
    x[2, 1, 0] = torch.inf
    zeros = torch.zeros(1, 6, hidden)
    weights = [torch.ones(5, 6, hidden), *torch.ones(2, 1, 6, hidden)]
    found = all_of(ours, x, (zeros, zeros), weights)
    with by_library():
        expected = all_of(ours, x, (zeros, zeros), weights)
    for name, one, other in zip(PARTS, found, expected, strict=True):
        assert not (one.isnan() & ~other.isnan()).any(), name


@pytest.mark.parametrize("hidden", [16, 20])
@pytest.mark.parametrize("rows_first", [False, True], ids=["steps first", "rows first"])
def test_gradients_that_do_not_lie_in_order_are_those_that_do(hidden: int, rows_first: bool):
    torch.manual_seed(0)
    ours, x = LSTM(4, hidden, batch_first=rows_first), torch.randn(6, 5, 4, requires_grad=True)
    outputs, gradient = ours(x)[0], torch.randn(6, hidden, 5).transpose(1, 2)
    leaves = [x, *ours.parameters()]
    found = torch.autograd.grad(outputs, leaves, gradient, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(outputs, leaves, gradient.contiguous()), rtol=0, atol=0)


def test_a_model_trains_alike_with_either():
    torch.manual_seed(0)
    model = BSRNN(BSRNNConfig(24, 2)).train()
    noisy = 0.1 * torch.randn(2, 8_000)
    assert isinstance(model.blocks[0].band_lstm, LSTM)
    assert model.blocks[0].band_lstm.obstacle(torch.randn(3, 31, 24)) is None
    gradients = []
    for context in (nullcontext(), by_library()):
        copied = copy.deepcopy(model)
        with context:
            copied(noisy).waveform.square().sum().backward()
        gradients.append(dict(copied.named_parameters()))
    for name, parameter in gradients[0].items():
        one, other = parameter.grad, gradients[1][name].grad
        assert one is not None
        assert other is not None
        assert float((one - other).abs().max()) <= 1e-4 * float(other.abs().max()) + 1e-8, name


def test_what_it_does_not_take_goes_to_the_library():
    x = torch.randn(5, 3, 4)
    large = LSTM(4, LARGEST_HIDDEN + 1)
    assert str(LARGEST_HIDDEN) in str(large.obstacle(x))
    assert "32 bits" in str(LSTM(4, 8).double().obstacle(x.double()))
    with torch.autocast("cpu", torch.float16):
        assert "32 bits" in str(LSTM(4, 8).obstacle(x))
    for network, given in ((large, x), (LSTM(4, 8).double(), x.double())):
        theirs = nn.LSTM(4, network.hidden_size).to(x.dtype if network is large else torch.float64)
        theirs.load_state_dict(network.state_dict())
        torch.testing.assert_close(network(given)[0], theirs(given)[0])


def test_a_tensor_of_a_subclass_goes_to_the_library():
    """It need not have memory that C could read."""
    torch.manual_seed(0)
    ours, x = LSTM(4, 8), torch.randn(5, 3, 4)
    assert "subclass" in str(ours.obstacle(TwoTensor(x, x)))
    assert "subclass" in str(ours.obstacle(x, *(TwoTensor(state, state) for state in torch.zeros(2, 1, 3, 8))))
    both = ours(TwoTensor(x, 2 * x))[0]
    torch.testing.assert_close(both.b, ours(2 * x)[0], atol=1e-6, rtol=1e-5)
    ours.weight_hh_l0 = nn.Parameter(TwoTensor(ours.weight_hh_l0.detach(), ours.weight_hh_l0.detach()))
    assert "subclass" in str(ours.obstacle(x))


@pytest.mark.parametrize("kind", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
@pytest.mark.parametrize("way", ["", "_reverse"])
def test_weights_of_other_shapes_are_the_librarys_to_refuse(kind: str, way: str, monkeypatch: pytest.MonkeyPatch):
    ours, x, given = LSTM(4, 8, bidirectional=True), torch.randn(5, 3, 4), []
    weight = getattr(ours, kind + way)

    def forward(self, input, hx):
        given.append(input)
        return input, (input, input)

    monkeypatch.setattr(nn.LSTM, "forward", forward)
    ours(x)
    assert not given
    weight.data = weight.data[:3]
    ours(x)
    assert given
    assert ours.obstacle(x) is None  # DeepSpeed, asked before a pass, has them in parts


def test_the_library_refuses_a_bias_of_another_shape():
    ours = LSTM(4, 8)
    ours.bias_ih_l0 = nn.Parameter(torch.randn(3))
    with pytest.raises(RuntimeError, match="must match the size"):
        ours(torch.randn(5, 3, 4))


@pytest.mark.parametrize("shape", [(5, 3, 6), (5, 3, 2)])
def test_inputs_of_another_width_are_refused_before_they_are_read(shape: tuple[int, ...]):
    with pytest.raises(RuntimeError, match=r"input\.size"):
        LSTM(4, 8)(torch.randn(shape))
    with pytest.raises(RuntimeError, match="Expected hidden"):
        LSTM(4, 8)(torch.randn(5, 3, 4), (torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)))


def test_states_and_weights_that_are_not_in_32_bits_are_torchs_to_refuse():
    x, states = torch.randn(5, 3, 4), (torch.zeros(1, 3, 8), torch.zeros(1, 3, 8))
    for wrong in (torch.float64, torch.bfloat16):
        with pytest.raises(RuntimeError):
            LSTM(4, 8)(x, (states[0], states[1].to(wrong)))
    mixed = LSTM(4, 8)
    mixed.bias_hh_l0.data = mixed.bias_hh_l0.data.double()
    assert mixed.obstacle(x) is not None


def test_other_weights_in_place_of_its_own_are_used():
    torch.manual_seed(0)
    ours, x = LSTM(4, 16, bidirectional=True), torch.randn(5, 3, 4)
    doubled = {name: 2 * parameter.detach() for name, parameter in ours.named_parameters()}
    with by_library():
        expected = torch.func.functional_call(ours, doubled, (x,))[0]
    torch.testing.assert_close(torch.func.functional_call(ours, doubled, (x,))[0], expected, atol=1e-6, rtol=1e-5)
    parametrizations.weight_norm(ours, "weight_hh_l0")
    ours.parametrizations.weight_hh_l0.original0.data.mul_(3)
    with by_library():
        expected = ours(x)[0]
    torch.testing.assert_close(ours(x)[0], expected, atol=1e-6, rtol=1e-5)


def test_the_gradients_of_the_two_biases_are_two_tensors():
    ours = LSTM(4, 8)
    for parameter in ours.parameters():
        parameter.register_hook(lambda gradient: gradient.mul_(0.5))
    ours(torch.randn(5, 3, 4))[0].square().sum().backward()
    assert torch.equal(ours.bias_ih_l0.grad, ours.bias_hh_l0.grad)


def test_what_follows_torchs_operators_sees_them():
    torch.manual_seed(0)
    ours, x = LSTM(4, 16), torch.randn(5, 3, 4)
    graph = make_fx(lambda inputs: ours(inputs)[0])(x)
    other = torch.randn(5, 3, 4)
    torch.testing.assert_close(graph(other), ours(other)[0], atol=1e-6, rtol=1e-5)
    by_func = torch.func.grad(lambda inputs: ours(inputs)[0].square().sum())(x)
    x.requires_grad_()
    (by_autograd,) = torch.autograd.grad(ours(x)[0].square().sum(), x)
    torch.testing.assert_close(by_func, by_autograd, atol=1e-6, rtol=1e-4)
    with FakeTensorMode():
        assert BSRNN(BSRNNConfig(16, 2))(torch.randn(2, 8_000)).waveform.shape == (2, 8_000)


def test_asked_for_bfloat16_it_runs_in_32_bits():
    """torch has such LSTMs for processors with AVX-512 alone."""
    torch.manual_seed(0)
    ours, x, state = LSTM(4, 8), torch.randn(5, 3, 4), torch.randn(1, 3, 8)
    for states in (None, (state, state)):
        expected = ours(x.bfloat16().float(), states and tuple(part.bfloat16().float() for part in states))
        with torch.autocast("cpu", torch.bfloat16):
            found = ours(x.bfloat16(), states and tuple(part.bfloat16() for part in states))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_under_autocast_a_wrapped_lstm_and_one_in_64_bits_are_served():
    torch.manual_seed(0)
    ours, x = LSTM(4, 8), torch.randn(5, 3, 4)
    expected = ours(x)[0]
    wrapped = copy.deepcopy(ours)
    wrapped.forward = torch.autocast("cpu", torch.bfloat16)(wrapped.forward)  # as Accelerate does
    torch.testing.assert_close(wrapped(x)[0], expected, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.double()(x.double())[0].dtype == torch.float64


def test_asked_for_bfloat16_on_a_gpu_it_runs_in_32_bits(monkeypatch: pytest.MonkeyPatch):
    """torch would give cuDNN 16-bit floats, whose range loses gradients. No GPU is needed to see what it is given."""
    given = []

    def forward(self, x, hx):
        given.append((x.dtype, hx and hx[0].dtype, torch.is_autocast_enabled("cuda")))
        return x, (x, x)

    monkeypatch.setattr(nn.LSTM, "forward", forward)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    on_before, dtype_before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        torch.set_autocast_enabled("cuda", True)
        with FakeTensorMode():
            lstm = LSTM(4, 8)
            x, state = (torch.empty(n, 3, 4, device="cuda", dtype=torch.bfloat16) for n in (5, 1))
            for dtype in (torch.bfloat16, torch.float16):
                torch.set_autocast_dtype("cuda", dtype)
                lstm(x)
                lstm(x, (state, state))
    finally:
        torch.set_autocast_enabled("cuda", on_before)
        torch.set_autocast_dtype("cuda", dtype_before)
    half, full = torch.bfloat16, torch.float32
    assert given == [(full, None, False), (full, full, False), (half, None, True), (half, half, True)]


# A process of its own: torch.compile would look into the checks of types that tests make.
COMPILED_MODEL = """
import torch
from torch._dynamo.testing import CompileCounter
from bsrnn import BSRNN, BSRNNConfig, lstm
lstm.keep_out_of_graphs()
torch.manual_seed(0)
model, noisy = BSRNN(BSRNNConfig(16, 1)).eval(), 0.1 * torch.randn(2, 8_000)
addresses, calls, graphs = lstm._addresses, [], CompileCounter()
with torch.no_grad():
    expected = model(noisy).waveform
    lstm._addresses = lambda given: calls.append(given) or addresses(given)
    found = torch.compile(model, backend=graphs)(noisy).waveform
torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
print(len(calls), graphs.frame_count)
"""


def test_a_compiled_model_calls_it_and_does_not_look_into_it():
    ended = subprocess.run([sys.executable, "-c", COMPILED_MODEL], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    num_calls, num_graphs = map(int, ended.stdout.split())
    assert num_calls == 2  # one over time, one over bands
    assert num_graphs <= 6  # what lies around and between the two, in the block and in the model


def test_a_second_derivative_is_refused():
    x = torch.randn(5, 3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(LSTM(4, 8)(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CC", "no-such-compiler")
    for cache in (compiled._made, lstm_module._library):
        cache.cache_clear()
    yield
    for cache in (compiled._made, lstm_module._library):
        cache.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_c_compiler_the_library_does_it():
    ours, x = LSTM(4, 8), torch.randn(5, 3, 4)
    assert "no-such-compiler" in str(ours.obstacle(x))
    assert ours(x)[0].shape == (5, 3, 8)


def test_a_compiler_without_openmp_makes_it_for_one_thread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_compiler: None
):
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-fopenmp*) echo "error: no OpenMP" >&2; exit 1;; esac\nexec cc "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    ours, x = LSTM(4, 8), torch.randn(5, 30, 4)
    assert ours.obstacle(x) is None
    with by_library():
        expected = ours(x)[0]
    torch.testing.assert_close(ours(x)[0], expected, atol=1e-6, rtol=1e-5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert ours.obstacle(x) == "compiled without OpenMP, torch uses 4 threads"  # which are faster


def test_a_compiler_that_is_too_slow_is_not_tried_without_openmp(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_compiler: None
):
    compiler, calls = tmp_path / "cc", tmp_path / "calls"
    compiler.write_text(f"#!/bin/sh\necho called >> {calls}\nexec sleep 60\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("bsrnn.compiled.COMPILER_SECONDS", 1)
    assert "took longer than 1 s" in str(LSTM(4, 8).obstacle(torch.randn(5, 3, 4)))
    assert calls.read_text() == "called\n"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CC": "'"}, "No closing quotation"),
        ({"CC": "true"}, "true ended with status 0, and made no library"),
        ({"XDG_CACHE_HOME": ""}, "set XDG_CACHE_HOME"),
        ({"XDG_CACHE_HOME": "/dev/null"}, "Not a directory"),
    ],
)
def test_whatever_keeps_it_from_being_compiled_is_a_line(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_compiler: None
):
    for name, value in ({"CC": "cc", "XDG_CACHE_HOME": str(tmp_path)} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user who has no home
    ours, x = LSTM(4, 8), torch.randn(5, 3, 4)
    assert said in str(ours.obstacle(x))
    assert "\n" not in str(ours.obstacle(x))
    assert str(tmp_path) not in str(ours.obstacle(x))
    assert ours(x)[0].shape == (5, 3, 8)


def test_a_library_that_cannot_be_loaded_is_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_compiler: None
):
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = compiled._target(lstm_module.SOURCE, ("-fopenmp",))
    target.parent.mkdir()
    target.write_bytes(b"")
    assert LSTM(4, 8).obstacle(torch.randn(5, 3, 4)) is None
    assert target.stat().st_size > 10_000
