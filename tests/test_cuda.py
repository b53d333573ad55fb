"""The engine on CUDA devices: arrays of other libraries, failing calls, schedules, Ctrl-C. Its sums are tested beside
the CPU's, in test_decoder.py.
"""

import ctypes
import dataclasses
import weakref
from typing import Any

import numpy as np
import pytest
import reference
import torch
from cuda_devices import Foreign, Tensor, emulator, needs_cuda, needs_emulator, on_device
from reference import SMALL_MODEL

import tipl
from tipl import device
from tipl.forecasting.decoder import Decoder, faster_device
from tipl.forecasting.forecaster import Forecaster
from tipl.forecasting.transformer import ModelConfig, TrajectoryTransformer


@pytest.fixture(autouse=True)
def leaves_nothing_on_the_device(clean_device: None) -> None:
    """Every test here."""


def make_decoder(batch: int = 1, config: ModelConfig = SMALL_MODEL, **arguments: Any) -> Decoder:
    return Decoder(config, reference.random_forecaster(config, 0), batch, device="cuda", **arguments)


def make_paths(batch: int, length: int, k: int = SMALL_MODEL.n_components) -> np.ndarray:
    steps = np.random.default_rng(1).standard_normal((batch, length, k))
    return (0.1 * np.cumsum(steps, axis=1)).astype(np.float32)


# ---- devices


def test_a_name_that_is_no_device_is_refused():
    for name in ("gpu", "cuda:", "cuda:-1", "cuda:1.5", "CUDA", "", "cuda:99999"):
        with pytest.raises(ValueError, match=r"^Decoder: device must be 'cpu', 'cuda', 'cuda:0', 'cuda:1' ..., got "):
            Decoder(SMALL_MODEL, reference.random_forecaster(SMALL_MODEL, 0), 1, device=name)


def test_without_a_device_cuda_is_refused_and_auto_takes_the_cpu(monkeypatch):
    def missing() -> None:
        raise RuntimeError("device: this tipl was built without CUDA (nvcc >= 12.4 makes it)")

    monkeypatch.setattr(device, "cuda_engine", missing)
    assert tipl.devices() == []
    with pytest.raises(RuntimeError, match=r"^device: this tipl was built without CUDA \(nvcc >= 12\.4 makes it\)$"):
        make_decoder()
    assert make_auto().device == "cpu"


def make_auto() -> Decoder:
    return Decoder(SMALL_MODEL, reference.random_forecaster(SMALL_MODEL, 0), 1, device="auto")


@needs_cuda
def test_a_device_that_is_not_there_is_refused():
    count = len(tipl.devices())
    with pytest.raises(
        RuntimeError, match=rf"^Decoder: device cuda:{count} is not there: this process sees {count} CUDA"
    ):
        Decoder(SMALL_MODEL, reference.random_forecaster(SMALL_MODEL, 0), 1, device=f"cuda:{count}")


@needs_cuda
def test_auto_takes_the_device_where_the_model_is_large():
    large = ModelConfig(n_layer=6, n_head=8, d_model=256, d_ff=1024)
    assert faster_device(large, 1) == "cuda"
    assert faster_device(large, 1, "int8") == "cpu"
    assert faster_device(SMALL_MODEL, 1) == "cpu"
    assert faster_device(SMALL_MODEL, 4096) == "cuda"
    assert make_auto().device == "cpu"


@needs_cuda
def test_the_command_line_says_what_is_there(run_tipl, capsys):
    assert run_tipl("--version") == 0
    assert f"{tipl.devices()[0]}" in capsys.readouterr().out.splitlines()


@needs_cuda
def test_int8_weights_are_refused():
    with pytest.raises(ValueError, match=r"^Decoder: dtype on a CUDA device must be float32 or bfloat16, got int8$"):
        make_decoder(dtype="int8")


@needs_cuda
def test_a_model_too_wide_for_a_block_is_refused():
    wide = ModelConfig(n_components=20_000, n_layer=1, n_head=1, d_model=4, d_ff=8, max_len=8)
    with pytest.raises(ValueError, match=r"^Decoder: a model of n_components = 20000, d_model = 4, .* needs \d+ bytes"):
        make_decoder(config=wide)


@needs_cuda
@pytest.mark.parametrize(("dtype", "fits"), [("float32", False), ("bfloat16", True)])
def test_weights_that_do_not_fit_into_shared_memory_are_read_where_they_are(dtype, fits):
    """Two layers for each block of the device."""
    config = ModelConfig(
        n_components=3, n_layer=2 * tipl.devices()[0].num_sms, n_head=1, d_model=104, d_ff=8, max_len=8
    )
    weights, x = reference.random_forecaster(config, 0), make_paths(1, 6, 3)
    assert make_decoder(config=config, dtype=dtype)._core.plan(many_rows=False)["resident"] == fits
    decoders = [Decoder(config, weights, 1, dtype=dtype, device=device) for device in ("cpu", "cuda")]
    for decoder in decoders:
        decoder.prefill(x[:, :4].copy())
    ours, theirs = (decoder.step(x[:, 4].copy()) for decoder in decoders)
    # With AVX512-BF16 the CPU rounds activations too, where weights are bfloat16.
    tolerance = 1e-3 if dtype == "float32" else 5e-3
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


# ---- arrays


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_torch_tensors_of_the_host_give_torch_tensors(device):
    x = make_paths(2, 9)
    weights = reference.random_forecaster(SMALL_MODEL, 0)
    ours, theirs = (Decoder(SMALL_MODEL, weights, 2, device=device) for _ in range(2))
    tensor = torch.from_numpy(x)
    first = ours.prefill(tensor, torch.tensor([9, 7]))
    assert isinstance(first, torch.Tensor)
    assert np.array_equal(first.numpy(), theirs.prefill(x, np.array([9, 7])))
    assert np.array_equal(
        ours.generate(torch.tensor([2, 3])).numpy(), theirs.generate(np.array([2, 3])), equal_nan=True
    )
    assert np.array_equal(ours.step(tensor[:, 0].contiguous()).numpy(), theirs.step(x[:, 0].copy()))
    with pytest.raises(ValueError, match=r"^step: x must be C-contiguous and aligned$"):
        ours.step(tensor[:, :5, 0])
    with pytest.raises(ValueError, match=r"^step: x: .*gradient"):
        ours.step(tensor[:, 0].contiguous().requires_grad_())
    with pytest.raises(TypeError, match=r"^step: x must be a NumPy array of float32, got float64$"):
        ours.step(tensor[:, 0].double())
    assert ours.position.tolist() == [12, 11]


@needs_cuda
def test_arrays_on_the_device_are_not_copied_and_results_stay_there():
    x, decoder, theirs = make_paths(2, 9), make_decoder(2), make_decoder(2)
    array = Foreign(on_device(x))
    first = decoder.prefill(array)
    assert first.__dlpack_device__() == (2, 0)
    assert first.shape == (2, 5)
    assert np.array_equal(first.numpy(), theirs.prefill(x))
    path = decoder.generate(4)
    assert np.array_equal(path.numpy(), theirs.generate(4))
    assert np.array_equal(decoder.step(on_device(x[:, 0].copy())).numpy(), theirs.step(x[:, 0].copy()))
    assert len(array.streams) == 1
    assert array.streams[0] > 2  # a stream of the decoder's own: its owner makes that wait


@needs_cuda
def test_a_capsule_keeps_the_memory_alive():
    array = on_device(make_paths(1, 3))
    capsule, watch = array.__dlpack__(), weakref.ref(array)
    del array
    assert watch() is None
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    assert Tensor.from_address(pointer(capsule, b"dltensor")).ndim == 3


@needs_cuda
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"type": (2, 64, 1)}, TypeError, r"^step: x must be an array of float32, got float64$"),
        ({"type": (4, 16, 1)}, TypeError, r"^step: x must be an array of float32, got bfloat16$"),
        ({"strides": (1, 2)}, ValueError, r"^step: x must be C-contiguous and aligned$"),
        ({"strides": (-5, 1)}, ValueError, r"^step: x must be C-contiguous and aligned$"),
        ({"device": (2, 1)}, ValueError, r"^step: x must be on cuda:0, got cuda:1$"),
        ({"device": (10, 0)}, ValueError, r"^step: x must be on cuda:0 or in the host's memory, got device type 10$"),
    ],
)
def test_device_arrays_of_another_kind_are_refused(changes, error, message):
    decoder = make_decoder(2)
    decoder.prefill(make_paths(2, 3))
    with pytest.raises(error, match=message):
        decoder.step(Foreign(on_device(make_paths(2, 1)[:, 0].copy()), **changes))
    with pytest.raises(ValueError, match=r"^step: x must have shape \(B, k\) = \(2, 5\), got \(2, 1, 5\)$"):
        decoder.step(on_device(make_paths(2, 1)))
    bad = make_paths(2, 1)[:, 0].copy()
    bad[1, 3] = np.nan
    with pytest.raises(ValueError, match=r"^step: x must be finite, got nan at \(1, 3\)$"):
        decoder.step(on_device(bad))
    assert decoder.position.tolist() == [3, 3]


@needs_cuda
def test_the_cpu_refuses_arrays_on_a_device():
    decoder = Decoder(SMALL_MODEL, reference.random_forecaster(SMALL_MODEL, 0), 2)
    with pytest.raises(ValueError, match=r"^prefill: x must be in the host's memory, as the engine is on the CPU$"):
        decoder.prefill(on_device(make_paths(2, 3)))


@needs_cuda
def test_a_rollout_on_the_device_is_that_of_the_cpu():
    config = dataclasses.replace(SMALL_MODEL, n_components=4)
    model = TrajectoryTransformer(config).eval()
    state = reference.random_forecaster(config, 0)
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in state.items()})
    prefix = np.cumsum(np.random.default_rng(2).standard_normal((2, 12, 30)), axis=1).astype(np.float32)
    ours, theirs = (tipl.rollout(prefix, 5, Forecaster(model), device=device) for device in ("cuda", "cpu"))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    assert not np.array_equal(theirs, np.repeat(prefix[:, -1:], 5, 1))


# ---- Ctrl-C


@needs_cuda
@pytest.mark.parametrize("batch", [1, 9])
def test_a_generate_that_is_stopped_goes_on_from_there(batch):
    x, decoder, whole = make_paths(batch, 6), make_decoder(batch), make_decoder(batch)
    decoder.prefill(x)
    whole.prefill(x)
    path = whole.generate(20)
    begun = decoder._core.generate_until_stopped(20).numpy()
    held = set(decoder.position.tolist())
    steps = held.pop() - 6
    assert not held
    assert 1 <= steps < 20
    assert np.array_equal(begun[:, :steps], path[:, :steps])
    assert np.array_equal(decoder.generate(20 - steps), path[:, steps:])


# ---- on the emulator: failing calls, and the order of blocks

CALLS = (
    "cudaMalloc",
    "cudaMemGetInfo",
    "cudaGetDevice",
    "cudaSetDevice",
    "cudaGetDeviceProperties",
    "cudaStreamCreateWithFlags",
    "cudaHostAlloc",
    "cudaHostGetDevicePointer",
    "cudaMemcpyAsync",
    "cudaMemcpy2DAsync",
    "cudaMemcpy",
    "cudaMemsetAsync",
    "cudaFuncSetAttribute",
    "cudaLaunchKernel",
    "cudaStreamQuery",
    "cudaStreamSynchronize",
)


@needs_emulator
@needs_cuda
@pytest.mark.parametrize("api", CALLS)
def test_a_cuda_call_that_fails_is_an_error_and_leaves_nothing(api, no_faults):
    """Every call of each kind, one after the other, from the first decoder to its last step."""
    x = make_paths(2, 5)
    expected = make_decoder(2)
    expected.prefill(x)
    path = expected.generate(3)
    del expected
    before = emulator.ptxrunLiveBytes()
    for number in range(1, 200):
        assert emulator.ptxrunFail(f"{api}:{number}".encode()) == 0
        decoder, message = attempt(x)
        calls = emulator.ptxrunCalls(api.encode())
        emulator.ptxrunFail(None)
        emulator.ptxrunClearError()
        if decoder is not None:
            goes_on_or_says_why_not(decoder, x)
            decoder.reset()
            decoder.prefill(x)
            assert np.array_equal(decoder.generate(3), path)
        decoder = None
        assert emulator.ptxrunLiveBytes() == before, f"{api}:{number}"
        if message is None and number > calls:
            break
        # What fails as a call ends, after its results are there, changes nothing: the device that was current before.
        assert api == "cudaSetDevice" if message is None else message.startswith(("cuda", "find_not_finite"))
    assert number > 1


def attempt(x: np.ndarray) -> tuple[Decoder | None, str | None]:
    """Use a decoder from its beginning to its end; return it, if it could be made, and what failed."""
    decoder = None
    try:
        decoder = make_decoder(2)
        decoder.prefill(x)
        decoder.generate(3)
        decoder.step(x[:, 0].copy())
    except RuntimeError as error:
        return decoder, str(error)
    return decoder, None


def goes_on_or_says_why_not(decoder: Decoder, x: np.ndarray) -> None:
    try:
        decoder.step(x[:, 0].copy())
    except RuntimeError as error:
        said = str(error)
        if "reset() and prefill again" not in said and "call prefill first" not in said:
            raise


@needs_emulator
@needs_cuda
def test_the_order_of_blocks_does_not_change_a_bit():
    x, paths = make_paths(9, 7), []
    for seed in range(4):
        emulator.ptxrunSeed(seed)
        decoder = make_decoder(9)
        first = decoder.prefill(x)
        paths.append(np.concatenate([first[:, None], decoder.generate(6)], axis=1))
    emulator.ptxrunSeed(0)
    assert all(np.array_equal(path, paths[0]) for path in paths)


@needs_emulator
@needs_cuda
@pytest.mark.parametrize(("dtype", "cache_dtype"), [("float32", "float32"), ("bfloat16", "bfloat16")])
def test_blocks_do_not_race(dtype, cache_dtype):
    """With the emulator's check of all accesses to global memory, for few rows and for many."""
    emulator.ptxrunCheck(b"all")
    try:
        for batch in (1, 9):
            decoder = make_decoder(batch, dtype=dtype, cache_dtype=cache_dtype)
            decoder.prefill(make_paths(batch, 7))
            decoder.generate(np.arange(1, batch + 1) % 4)
    finally:
        emulator.ptxrunCheck(b"memory,init,races,sync,host")
    assert emulator.ptxrunLastMessage() == b""
