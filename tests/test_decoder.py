"""The native decoder against the float64 oracle, and against itself: prefill, step, generate."""

import contextlib
import copy
import dataclasses
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import IMPORT_CORE, ISAS, run_python
from reference import SMALL_MODEL

from tipl import _core
from tipl.forecasting.decoder import Decoder
from tipl.forecasting.transformer import ModelConfig, TrajectoryTransformer

HALVED = dataclasses.replace(SMALL_MODEL, n_head=2, d_model=192, d_ff=384)  # two threads split its blocks in halves
EPS = np.finfo(np.float32).eps

# What weights and cache are stored in.
MODES = [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("int8", "bfloat16")]
modes = pytest.mark.parametrize(("dtype", "cache_dtype"), MODES, ids=["-".join(mode) for mode in MODES])

# Sizes around the vector width N of the instruction set in use.
N = _core.lanes()
SIZES = sorted({1, 3, 7, N - 1, N, N + 1, 8 * N + 2})


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """The models here are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ON_EACH_DEVICE = True
cpu_only = pytest.mark.cpu_only
_device = "cpu"


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, clean_device: None) -> str:
    """Where decoder_of_model and decoder_of_weights make decoders in this test."""
    global _device
    _device = request.param
    return _device


def decoder_of_model(model: TrajectoryTransformer, batch_size: int, **arguments) -> Decoder:
    return Decoder.from_model(model, batch_size, device=on_this_device(arguments), **arguments)


def decoder_of_weights(config: ModelConfig, weights, batch_size: int, **arguments) -> Decoder:
    return Decoder(config, weights, batch_size, device=on_this_device(arguments), **arguments)


def on_this_device(arguments) -> str:
    if _device == "cuda" and arguments.get("dtype") == "int8":
        pytest.skip("int8 weights are for the CPU")
    return _device


def make_model(config: ModelConfig, seed: int = 0) -> TrajectoryTransformer:
    """A model with random weights, biases and head: an untrained one predicts persistence, whatever its blocks do."""
    model = TrajectoryTransformer(config).eval()
    model.load_state_dict({name: torch.from_numpy(w) for name, w in reference.random_forecaster(config, seed).items()})
    return model


def make_paths(config: ModelConfig, batch: int, length: int, seed: int = 1) -> np.ndarray:
    """Smooth random paths (B, T, k), as trajectories are."""
    steps = np.random.default_rng(seed).standard_normal((batch, length, config.n_components))
    return (0.1 * np.cumsum(steps, axis=1)).astype(np.float32)


def oracle(config: ModelConfig, x: np.ndarray, prefix_end: int, seed: int = 0) -> np.ndarray:
    return reference.forecaster(config, reference.random_forecaster(config, seed), x, np.full(len(x), prefix_end))


def assert_as_exact_as_torch(ours: np.ndarray, torch_float32: np.ndarray, exact: np.ndarray) -> None:
    """Our largest error is at most twice that of torch in the same precision, and some units in the last place."""
    assert np.abs(torch_float32 - exact).max() < 1e-4 * np.abs(exact).max()  # the bound below means something
    bound = 2 * np.abs(torch_float32 - exact).max() + 4 * EPS * np.abs(exact).max()
    assert np.abs(ours - exact).max() <= bound


def feed(decoder: Decoder, x: np.ndarray, prefix: int) -> np.ndarray:
    """The predictions (B, T - prefix + 1, k) that follow x[:, :prefix], x[:, :prefix + 1], ... x."""
    rows = [decoder.prefill(np.ascontiguousarray(x[:, :prefix]))]
    rows += [decoder.step(np.ascontiguousarray(x[:, t])) for t in range(prefix, x.shape[1])]
    return np.stack(rows, axis=1)


# ---- exactness


@cpu_only
def test_the_oracle_is_the_torch_model_in_float64():
    config = dataclasses.replace(SMALL_MODEL, max_len=64)  # a power of two: torch's float32 (t - h) / max_len is exact
    x, prefix_end = make_paths(config, 3, 64), np.array([3, 40, 63])
    with torch.inference_mode():
        theirs = make_model(config).double()(torch.from_numpy(x).double(), torch.from_numpy(prefix_end)).numpy()
    ours = reference.forecaster(config, reference.random_forecaster(config, 0), x, prefix_end)
    assert np.abs(ours - theirs).max() < 1e-13 * np.abs(theirs).max()


def test_the_bound_notices_a_small_mistake():
    model, x = make_model(SMALL_MODEL), make_paths(SMALL_MODEL, 2, 40)
    exact = oracle(SMALL_MODEL, x, 19)[:, 19:]
    with torch.inference_mode():
        torch_float32 = model(torch.from_numpy(x), torch.full((2,), 19)).numpy()[:, 19:]
    model.config = dataclasses.replace(SMALL_MODEL, diff_scale=SMALL_MODEL.diff_scale * 1.0001)
    with pytest.raises(AssertionError):
        assert_as_exact_as_torch(feed(decoder_of_model(model, 2), x, 20), torch_float32, exact)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(max_len=532, out_scale=0.01),
        ModelConfig(n_components=7, n_layer=2, n_head=3, d_model=51, d_ff=130, max_len=540, out_scale=0.01),
        ModelConfig(n_components=32, n_layer=1, n_head=1, d_model=24, d_ff=600, max_len=550, out_scale=0.01),
    ],
    ids=["default", "odd", "wide"],
)
def test_a_rollout_of_512_steps_is_as_exact_as_torch(config, batch, device):
    steps = 512 if device == "cpu" else 60
    model = make_model(config)
    x = make_paths(config, batch, 20)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double().unroll(torch.from_numpy(x).double(), steps).numpy()
        torch_float32 = model.unroll(torch.from_numpy(x), steps).numpy()
    decoder = decoder_of_model(model, batch)
    decoder.prefill(x)
    ours = decoder.generate(steps)
    assert np.abs(np.diff(exact, axis=1)).max() > 1e-3  # it moves
    assert np.abs(exact).max() < 20  # and does not diverge
    assert np.abs(ours - exact).max() < 2 * np.abs(torch_float32 - exact).max()


@pytest.mark.parametrize("config", [SMALL_MODEL, HALVED], ids=["small", "halved"])
@pytest.mark.parametrize("prefix", [1, 2, 40, 80])
def test_every_step_equals_the_full_recompute(prefix, config):
    model, x = make_model(config), make_paths(config, 2, 80)
    exact = oracle(config, x, prefix - 1)[:, prefix - 1 :]
    with torch.inference_mode():
        torch_float32 = model(torch.from_numpy(x), torch.full((2,), prefix - 1)).numpy()[:, prefix - 1 :]
    assert_as_exact_as_torch(feed(decoder_of_model(model, 2, num_threads=2), x, prefix), torch_float32, exact)


@pytest.mark.slow
@modes
def test_a_path_of_8192_tokens(dtype, cache_dtype, device):
    """Each prediction sees all that came before, to the very end."""
    length, prefix = (8192, 1) if device == "cpu" else (1056, 1040)  # the device's stripes begin anew after 512
    config = ModelConfig(n_components=3, n_layer=1, n_head=2, d_model=24, d_ff=32, max_len=length, out_scale=0.5)
    model, x = make_model(config), make_paths(config, 1, length)
    x /= np.abs(x).max()
    with torch.inference_mode():
        h = torch.tensor([prefix - 1])
        torch_float32 = model(torch.from_numpy(x), h)[:, -1].numpy()
        exact = copy.deepcopy(model).double()(torch.from_numpy(x).double(), h)[:, -1].numpy()
    decoder = decoder_of_model(model, 1, dtype=dtype, cache_dtype=cache_dtype)
    decoder.prefill(x[:, :prefix].copy())
    for t in range(prefix, length):
        last = decoder.step(x[:, t].copy())
    if dtype == cache_dtype == "float32":
        assert_as_exact_as_torch(last, torch_float32, exact)
    else:
        assert relative_error(last, exact, x[:, -1]) < 0.02
    with pytest.raises(
        ValueError, match=rf"^generate: the cache is full: sequence 0 holds {length} of max_len = {length} tokens"
    ):
        decoder.generate(1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("which", ["n_components", "head_dim", "d_ff"])
def test_sizes_around_the_vector_width(which, size):
    config = dataclasses.replace(SMALL_MODEL, max_len=20)
    if which == "head_dim":
        config = dataclasses.replace(config, n_head=2, d_model=2 * size)
    else:
        config = dataclasses.replace(config, **{which: size})
    model, x = make_model(config), make_paths(config, 3, 20)
    exact = oracle(config, x, 11)[:, 11:]
    with torch.inference_mode():
        torch_float32 = model(torch.from_numpy(x), torch.full((3,), 11)).numpy()[:, 11:]
    assert_as_exact_as_torch(feed(decoder_of_model(model, 3), x, 12), torch_float32, exact)


@pytest.mark.slow
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != _core.isa()])
@cpu_only
def test_each_other_instruction_set_is_exact(isa):
    if run_python(IMPORT_CORE, TIPL_ISA=isa).returncode != 0:
        pytest.skip(f"this CPU lacks {isa}")
    tests = "test_sizes or (test_every_step and 40) or (512_steps and odd-1) or test_stored or test_a_prefill"
    tests = f"not cuda and ({tests})"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", tests],
        env=os.environ | {"TIPL_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout


# ---- stored in fewer bits


def relative_error(ours: np.ndarray, exact: np.ndarray, x: np.ndarray) -> float:
    """The error of predicted changes, relative to them."""
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact - x))


@pytest.mark.parametrize(
    "config",
    [HALVED, *(dataclasses.replace(SMALL_MODEL, d_model=d, d_ff=2 * d + 1) for d in (39, 96, 264))],
    ids=["halved", "39", "96", "264"],
)
@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize(("dtype", "stated"), [("bfloat16", 0.006), ("int8", 0.02)])
def test_stored_weights_are_those_of_the_reference(dtype, stated, batch, config, device):
    """Beside the oracle with the same rounded weights only the rounding of sums is left, and of bfloat16 inputs."""
    config = dataclasses.replace(config, out_scale=0.5)
    weights, x, prefix_end = reference.random_forecaster(config, 0), make_paths(config, batch, 30), np.full(batch, 14)
    rounded = reference.stored(weights, dtype)
    exact, exact_rounded = (reference.forecaster(config, w, x, prefix_end)[:, 14:] for w in (weights, rounded))
    model = TrajectoryTransformer(config).eval()
    model.load_state_dict({name: torch.from_numpy(w) for name, w in rounded.items()})
    with torch.inference_mode():
        torch_float32 = model(torch.from_numpy(x), torch.from_numpy(prefix_end)).numpy()[:, 14:]
    ours = feed(decoder_of_weights(config, weights, batch, dtype=dtype), x, 15)
    if device == "cpu" and _core.isa() == "avx512bf16":  # rounds the inputs of a product too, beside int8 to 16 bits
        assert 1e-5 < relative_error(ours, exact_rounded, x[:, 14:]) < (stated if dtype == "bfloat16" else 1e-4)
    else:
        assert_as_exact_as_torch(ours, torch_float32, exact_rounded)
    assert 1e-3 < relative_error(ours, exact, x[:, 14:]) < stated


@pytest.mark.parametrize("head_dim", [1, 13, 32])
def test_stored_keys_and_values_are_rounded_to_bfloat16(head_dim):
    config = dataclasses.replace(SMALL_MODEL, d_model=3 * head_dim, out_scale=0.5)
    weights, x = reference.random_forecaster(config, 0), make_paths(config, 3, 80)
    exact = reference.forecaster(config, weights, x, np.full(3, 19))[:, 19:]
    ours = feed(decoder_of_weights(config, weights, 3, cache_dtype="bfloat16"), x, 20)
    assert 1e-5 < relative_error(ours, exact, x[:, 19:]) < 0.002


@pytest.mark.slow
@modes
def test_a_stored_rollout_is_as_exact_as_torch_in_the_same_precision(dtype, cache_dtype, device):
    """torch's bfloat16 autocast rounds weights, keys and values as we do, and every result besides."""
    config, steps = ModelConfig(max_len=150, out_scale=0.01), 130 if device == "cpu" else 25
    model, x = make_model(config), make_paths(config, 4, 20)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double().unroll(torch.from_numpy(x).double(), steps).numpy()
        with torch.autocast("cpu", torch.bfloat16):
            torch_bfloat16 = model.unroll(torch.from_numpy(x), steps).float().numpy()
    decoder = decoder_of_model(model, 4, dtype=dtype, cache_dtype=cache_dtype)
    decoder.prefill(x)
    error, theirs = (np.linalg.norm(path - exact) for path in (decoder.generate(steps), torch_bfloat16))
    assert error < (3 if dtype == "int8" else 1) * theirs


def test_weights_near_the_largest_float_stay_finite_in_bfloat16():
    weights = reference.random_forecaster(SMALL_MODEL, 0)
    for name in ("norm1.weight", "norm1.bias", "qkv.bias"):
        weights[f"blocks.0.{name}"][:] = 0  # what proj multiplies is zero, and zero times infinity would be NaN
    weights["blocks.0.proj.weight"][0, 0] = np.finfo(np.float32).max
    assert np.isfinite(
        decoder_of_weights(SMALL_MODEL, weights, 1, dtype="bfloat16").prefill(make_paths(SMALL_MODEL, 1, 1))
    ).all()


@cpu_only
def test_rows_of_zeros_stay_zero_in_int8():
    weights, x = reference.random_forecaster(SMALL_MODEL, 0), make_paths(SMALL_MODEL, 1, 12)
    weights["blocks.0.fc1.weight"][::2] = 0
    exact = reference.forecaster(SMALL_MODEL, reference.stored(weights, "int8"), x, np.array([5]))[:, 5:]
    ours = feed(decoder_of_weights(SMALL_MODEL, weights, 1, dtype="int8"), x, 6)
    assert relative_error(ours, exact, x[:, 5:]) < (1e-4 if _core.isa() == "avx512bf16" else 1e-5)


@cpu_only
def test_rows_of_inputs_of_any_length_and_size_in_int8():
    """One row rounds its first 4096 inputs once, and later ones anew, as several rows do with all."""
    config = dataclasses.replace(SMALL_MODEL, d_model=39, d_ff=4500)
    weights, x = reference.random_forecaster(config, 0), make_paths(config, 4, 8)
    exact = reference.forecaster(config, reference.stored(weights, "int8"), x, np.full(4, 3))[:, 3:]
    together = feed(decoder_of_weights(config, weights, 4, dtype="int8"), x, 4)
    assert relative_error(together, exact, x[:, 3:]) < 1e-4
    for row, ours in enumerate(together):
        alone = feed(decoder_of_weights(config, weights, 1, dtype="int8"), x[row : row + 1], 4)
        np.testing.assert_array_equal(alone[0], ours)


# ---- the same bits


@modes
@pytest.mark.parametrize("batch", [1, 3, 12])
def test_a_prefill_equals_the_same_tokens_one_by_one(batch, dtype, cache_dtype, device):
    lengths = (2, 9, 64, 65, 75) if device == "cpu" else (2, 9, 34)
    model, x = make_model(SMALL_MODEL), make_paths(SMALL_MODEL, batch, lengths[-1])
    with torch.no_grad():
        model.embed.weight[:, -1] = 0  # the prefix's end is not seen, and prefixes of other lengths are comparable
    stored = {"dtype": dtype, "cache_dtype": cache_dtype}
    steps = feed(decoder_of_model(model, batch, **stored), x, 1)
    for length in lengths:
        decoder = decoder_of_model(model, batch, **stored)
        assert np.array_equal(decoder.prefill(np.ascontiguousarray(x[:, :length])), steps[:, length - 1])


def test_generate_is_step_on_its_own_predictions():
    model, x = make_model(SMALL_MODEL), make_paths(SMALL_MODEL, 3, 10)
    stepped, generated = decoder_of_model(model, 3), decoder_of_model(model, 3)
    prediction, path = stepped.prefill(x), []
    for _ in range(70):
        path.append(prediction)
        prediction = stepped.step(prediction)
    generated.prefill(x)
    assert np.array_equal(np.concatenate([generated.generate(30), generated.generate(40)], axis=1), np.stack(path, 1))
    assert np.array_equal(stepped.position, generated.position)


# The fixture says on which device all examples run.
@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    trajectories=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 50)), min_size=1, max_size=9),
    mode=st.sampled_from(MODES),
    num_threads=st.sampled_from([1, 3]),
)
def test_a_sequence_alone_equals_itself_in_a_ragged_batch(device, trajectories, mode, num_threads):
    if device == "cuda":  # a few, and no int8
        trajectories, mode = [(1 + t % 12, n % 8) for t, n in trajectories], min(mode, ("bfloat16", "bfloat16"))
    model, x = make_model(SMALL_MODEL), make_paths(SMALL_MODEL, len(trajectories), 40)
    lengths, n = np.array(trajectories).T
    for b, length in enumerate(lengths):
        x[b, length:] = np.nan  # never read
    stored = dict(zip(("dtype", "cache_dtype"), mode, strict=True))
    together = decoder_of_model(model, len(lengths), num_threads=num_threads, **stored)
    alone = decoder_of_model(model, 1, num_threads=1, **stored)
    first = together.prefill(x, lengths)
    assert np.array_equal(together.position, lengths)
    path = together.generate(n)
    assert path.shape == (len(lengths), n.max(), SMALL_MODEL.n_components)
    assert np.array_equal(together.position, lengths + n)
    for b, length in enumerate(lengths):
        alone.reset()
        assert np.array_equal(alone.prefill(x[b : b + 1, :length])[0], first[b])
        if n[b] > 0:
            assert np.array_equal(alone.generate(int(n[b]))[0], path[b, : n[b]])
        assert np.isnan(path[b, n[b] :]).all()


@pytest.mark.slow
@modes
@pytest.mark.parametrize("batch", [1, 3, 6])
@pytest.mark.parametrize("n_head", [1, 3, 4])  # two threads split a block of four heads in halves, while rows are few
@cpu_only
def test_threads_do_not_change_a_bit(n_head, batch, dtype, cache_dtype):
    config = ModelConfig(n_head=n_head, n_layer=2, d_model=192, d_ff=768, max_len=140)  # batch 1 is enough to share
    model, x, lengths = make_model(config), make_paths(config, 6, 60), np.array([60, 2, 33, 59, 1, 60])[:batch]

    def path(rows: int, num_threads: int) -> np.ndarray:
        decoder = decoder_of_model(model, rows, dtype=dtype, cache_dtype=cache_dtype, num_threads=num_threads)
        assert decoder.num_threads == num_threads
        first = decoder.prefill(x[:rows], lengths[:rows])
        return np.concatenate([first[:, None], decoder.generate(80)], axis=1)

    alone = path(batch, 1)
    assert np.array_equal(path(batch, 2), alone)
    assert np.array_equal(path(batch, 7), alone)
    assert np.array_equal(path(1, 2), alone[:1])


@pytest.mark.slow
@cpu_only
def test_beside_busy_processes_paths_have_the_same_bits():
    """Passes run on two threads or on one there, whichever is quicker (csrc/cpu/team_choice.h)."""
    config = ModelConfig(n_head=4, n_layer=4, d_model=128, d_ff=512, max_len=256)
    model, x = make_model(config), make_paths(config, 8, 1)
    alone, together = (decoder_of_model(model, 8, num_threads=n) for n in (1, 2))
    alone.prefill(x)
    expected = alone.generate(200)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(_core.available_cpus() // 2)]
    try:
        for _ in range(10):
            together.reset()
            together.prefill(x)
            assert np.array_equal(together.generate(200), expected)
    finally:
        for process in busy:
            process.kill()
            process.wait()


@modes
def test_a_reset_decoder_forgets(dtype, cache_dtype):
    model, x = make_model(SMALL_MODEL), make_paths(SMALL_MODEL, 2, 30)
    decoder = decoder_of_model(model, 2, dtype=dtype, cache_dtype=cache_dtype)
    decoder.prefill(x)
    path = decoder.generate(50)
    decoder.reset()
    decoder.prefill(10 * x[:, ::-1].copy())
    decoder.generate(60)
    decoder.reset()
    assert decoder.position.tolist() == [0, 0]
    decoder.prefill(x)
    assert np.array_equal(decoder.generate(50), path)


@modes
def test_a_diverging_path_is_returned_as_it_is_and_forgotten(dtype, cache_dtype):
    config = dataclasses.replace(SMALL_MODEL, diff_scale=1e30, out_scale=1e30)
    stored = {"dtype": dtype, "cache_dtype": cache_dtype}
    decoder, fresh = (decoder_of_model(make_model(config), 1, **stored) for _ in range(2))
    decoder.prefill(make_paths(config, 1, 5))
    assert not np.isfinite(decoder.generate(20)).all()
    for length in range(1, 12):  # the last slot of a pair or of a block may hold NaN beside it
        decoder.reset()
        fresh.reset()
        rest = np.zeros((1, length, 5), np.float32)
        path = decoder.prefill(rest)
        assert np.isfinite(path).all()
        assert np.array_equal(path, fresh.prefill(rest))


# ---- limits and rejections


def test_a_full_cache_raises_and_keeps_what_it_holds():
    model, x = make_model(SMALL_MODEL), make_paths(SMALL_MODEL, 2, 8)
    decoder = decoder_of_model(model, 2, max_len=12)
    decoder.prefill(x, np.array([8, 6]))
    with pytest.raises(
        ValueError,
        match=r"^generate: the cache is full: sequence 0 holds 8 of max_len = 12 tokens, 5 more do not fit$",
    ):
        decoder.generate(5)
    decoder.generate(4)
    assert decoder.position.tolist() == [12, 10]
    with pytest.raises(
        ValueError, match=r"^step: the cache is full: sequence 0 holds 12 of max_len = 12 tokens, 1 more do not fit$"
    ):
        decoder.step(x[:, 0].copy())
    assert decoder.position.tolist() == [12, 10]


def decoder_of_four(k: int = 16) -> Decoder:
    return decoder_of_model(make_model(ModelConfig(n_components=k, n_layer=1, d_model=8, d_ff=8)), 4)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (zeros(4, 7, 12), ValueError, r"prefill: x must have shape (B, t, k) = (4, t, 16), got (4, 7, 12)"),
        (zeros(3, 7, 16), ValueError, r"prefill: x must have shape (B, t, k) = (4, t, 16), got (3, 7, 16)"),
        (zeros(4, 16), ValueError, r"prefill: x must have shape (B, t, k) = (4, t, 16), got (4, 16)"),
        (zeros(4, 0, 16), ValueError, r"prefill: t must lie in [1, 64], as max_len is, got 0"),
        (zeros(4, 65, 16), ValueError, r"prefill: t must lie in [1, 64], as max_len is, got 65"),
        (zeros(4, 16, 7).swapaxes(1, 2), ValueError, "prefill: x must be C-contiguous and aligned"),
        (np.zeros((4, 7, 16)), TypeError, "prefill: x must be a NumPy array of float32, got float64"),
        (zeros(4, 7, 16).astype(">f4"), TypeError, "prefill: x must be a NumPy array of float32, got >f4"),
        ([[0.0]], TypeError, "prefill: x must be a NumPy array of float32, got list"),
    ],
)
def test_prefill_refuses(x, error, message):
    decoder = decoder_of_four()
    with pytest.raises(error) as raised:
        decoder.prefill(x)
    assert str(raised.value) == message
    assert decoder.position.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (np.array([1, 2, 3]), ValueError, "prefill: lengths must have shape (B,) = (4,), got (3,)"),
        (np.array([1, 2, 0, 3]), ValueError, "prefill: lengths must lie in [1, 7], got 0 for sequence 2"),
        (np.array([1, 2, 3, 8]), ValueError, "prefill: lengths must lie in [1, 7], got 8 for sequence 3"),
        (np.array([1.0, 2, 3, 4]), TypeError, "prefill: lengths must be integers, got float64"),
    ],
)
def test_prefill_refuses_lengths(lengths, error, message):
    with pytest.raises(error) as raised:
        decoder_of_four().prefill(zeros(4, 7, 16), lengths)
    assert str(raised.value) == message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value):
    decoder, x = decoder_of_four(), zeros(4, 7, 16)
    x[2, 5, 11] = value
    with pytest.raises(ValueError, match=rf"^prefill: x\[2\] must be finite, got {value} at \(5, 11\)$"):
        decoder.prefill(x)
    decoder.prefill(zeros(4, 7, 16))
    with pytest.raises(ValueError, match=rf"^step: x must be finite, got {value} at \(2, 11\)$"):
        decoder.step(x[:, 5].copy())
    assert decoder.position.tolist() == [7] * 4


def test_step_and_generate_refuse_senseless_arguments():
    decoder = decoder_of_four()
    decoder.prefill(zeros(4, 7, 16))
    with pytest.raises(ValueError, match=r"^step: x must have shape \(B, k\) = \(4, 16\), got \(4, 1, 16\)$"):
        decoder.step(zeros(4, 1, 16))
    with pytest.raises(TypeError, match=r"^step: x must be a NumPy array of float32, got int64$"):
        decoder.step(np.zeros((4, 16), np.int64))
    with pytest.raises(TypeError, match=r"^generate: n must be an int, got '3'$"):
        decoder.generate("3")
    for n in (0, -1):
        with pytest.raises(ValueError, match=rf"^generate: n must be >= 1, got {n}$"):
            decoder.generate(n)
    with pytest.raises(ValueError, match=r"^generate: the cache is full: .* 4611686018427387904 more do not fit$"):
        decoder.generate(2**62)


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (np.array([1, 2, 3]), ValueError, "generate: n must have shape (B,) = (4,), got (3,)"),
        (np.array([1, 2, -1, 3]), ValueError, "generate: n must be >= 0, got -1 for sequence 2"),
        (
            np.array([1, 2, 0, 58]),
            ValueError,
            "generate: the cache is full: sequence 3 holds 7 of max_len = 64 tokens, 58 more do not fit",
        ),
        (np.array([1.0, 2, 3, 4]), TypeError, "generate: n must be integers, got float64"),
    ],
)
def test_generate_refuses_steps_of_each_sequence(n, error, message):
    decoder = decoder_of_four()
    decoder.prefill(zeros(4, 7, 16))
    with pytest.raises(error) as raised:
        decoder.generate(n)
    assert str(raised.value) == message
    assert decoder.position.tolist() == [7] * 4


def test_calls_out_of_order_are_refused():
    decoder = decoder_of_four()
    with pytest.raises(RuntimeError, match=r"^step: the decoder is empty; call prefill first$"):
        decoder.step(zeros(4, 16))
    with pytest.raises(RuntimeError, match=r"^generate: the decoder is empty; call prefill first$"):
        decoder.generate(1)
    decoder.prefill(zeros(4, 7, 16))
    with pytest.raises(
        RuntimeError,
        match=r"^prefill: the decoder must be empty, but sequence 0 holds 7 tokens; call reset\(\) first$",
    ):
        decoder.prefill(zeros(4, 7, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "Decoder: batch_size must lie in [1, 16777216], got 0"),
        ({"max_len": 0}, "Decoder: max_len must lie in [1, 90], got 0"),
        ({"max_len": 91}, "Decoder: max_len must lie in [1, 90], got 91"),
        ({"dtype": "float16"}, "Decoder: dtype must be one of 'float32', 'bfloat16', 'int8', got 'float16'"),
        ({"cache_dtype": "int8"}, "Decoder: cache_dtype must be one of 'float32', 'bfloat16', got 'int8'"),
    ],
)
def test_senseless_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=r".*") as raised:
        decoder_of_model(make_model(SMALL_MODEL), **({"batch_size": 1} | arguments))
    assert str(raised.value) == message


@cpu_only
@pytest.mark.parametrize("num_threads", [0, 2**40])
def test_a_senseless_number_of_threads_is_refused(num_threads):
    with pytest.raises(ValueError, match=rf"^num_threads must lie in \[1, 1024\], got {num_threads}$"):
        decoder_of_model(make_model(SMALL_MODEL), 1, num_threads=num_threads)


@pytest.mark.parametrize("name", ["batch_size", "max_len", "num_threads"])
def test_settings_that_are_no_ints_are_refused(name):
    with pytest.raises(TypeError, match=rf"^Decoder: {name} must be an int, got 2\.5$"):
        decoder_of_model(make_model(SMALL_MODEL), **({"batch_size": 1} | {name: 2.5}))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value):
    model = make_model(SMALL_MODEL)
    with torch.no_grad():
        model.blocks[1].fc1.weight[3, 4] = value
    with pytest.raises(ValueError, match=rf"^Decoder: blocks\.1\.fc1\.weight must be finite, got {value} at \(3, 4\)$"):
        decoder_of_model(model, 1)


def test_weights_that_do_not_fit_the_config_are_refused():
    weights = reference.random_forecaster(SMALL_MODEL, 0)
    with pytest.raises(
        ValueError, match=r"^Decoder: head\.weight must have shape \(out, in\) = \(5, 39\), got \(39, 5\)$"
    ):
        decoder_of_weights(SMALL_MODEL, weights | {"head.weight": np.ascontiguousarray(weights["head.weight"].T)}, 1)
    with pytest.raises(ValueError, match=r"^Decoder: norm\.bias must have shape \(out,\) = \(39,\), got \(38,\)$"):
        decoder_of_weights(SMALL_MODEL, weights | {"norm.bias": zeros(38)}, 1)
    with pytest.raises(TypeError, match=r"^Decoder: pos\.weight must be a NumPy array of float32, got float64$"):
        decoder_of_weights(SMALL_MODEL, weights | {"pos.weight": weights["pos.weight"].astype(np.float64)}, 1)
    with pytest.raises(ValueError, match=r"^Decoder: weights must be 31 tensors, got 32$"):
        decoder_of_weights(SMALL_MODEL, weights | {"blocks.2.qkv.weight": zeros(1)}, 1)
    with pytest.raises(ValueError, match=r"^Decoder: weights lack 'norm\.weight'$"):
        decoder_of_weights(SMALL_MODEL, {name: w for name, w in weights.items() if name != "norm.weight"}, 1)


def test_a_model_of_another_precision_is_refused():
    with pytest.raises(
        TypeError, match=r"^from_model: model's embed\.weight must be torch\.float32, got torch\.float64$"
    ):
        decoder_of_model(make_model(SMALL_MODEL).double(), 1)


def test_a_cache_that_does_not_fit_into_memory_is_refused():
    with pytest.raises(MemoryError):
        decoder_of_model(make_model(SMALL_MODEL), 2**24, max_len=90)


# ---- threads, signals, forks


@cpu_only
def test_generate_runs_without_the_gil_and_refuses_a_second_caller():
    config = dataclasses.replace(SMALL_MODEL, max_len=3_000)
    decoder = decoder_of_model(make_model(config), 1, num_threads=1)
    decoder.prefill(make_paths(config, 1, 1))

    def generate() -> None:
        while True:  # again where the other thread asked for the position just then
            with contextlib.suppress(RuntimeError):
                decoder.generate(2_500)
                return

    worker = threading.Thread(target=generate)
    worker.start()
    with pytest.raises(RuntimeError, match=r"^position: the decoder is in use by another call$"):
        while worker.is_alive():
            assert decoder.position[0] == 1  # not yet begun
    worker.join()
    assert decoder.position.tolist() == [2_501]


SCRIPT = """
import dataclasses, os, signal, threading, time
import numpy as np, reference
from tipl.forecasting.decoder import Decoder

def decoder_for(max_len, batch=1, **arguments):
    config = dataclasses.replace(reference.SMALL_MODEL, max_len=max_len)
    return Decoder(config, reference.random_forecaster(config, 0), batch, **arguments)
"""


@pytest.mark.slow
@cpu_only
def test_ctrl_c_stops_the_decoder_and_leaves_it_usable():
    done = run_python(
        SCRIPT
        + """
def interrupted(work):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        work()
    except KeyboardInterrupt:
        return True

prefix = np.ones((1, 4, 5), np.float32)
decoder, other = decoder_for(200_000), decoder_for(200_000)
decoder.prefill(prefix)
assert interrupted(lambda: decoder.generate(199_000))
held = int(decoder.position[0])
assert 4 < held < 199_000, held
rest = decoder.generate(10)
other.prefill(prefix)
assert np.array_equal(other.generate(held - 4 + 10)[:, -10:], rest)

decoder.reset()
assert interrupted(lambda: decoder.prefill(np.zeros((1, 200_000, 5), np.float32)))
assert decoder.position.tolist() == [0]
decoder.prefill(prefix)
assert np.array_equal(decoder.generate(10), (other.reset(), other.prefill(prefix), other.generate(10))[2])
"""
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@cpu_only
def test_ctrl_c_stops_a_pass_between_its_layers():
    """One pass of this decoder takes many times as long as a signal may wait."""
    done = run_python(
        SCRIPT
        + """
config = reference.ModelConfig(n_components=5, n_layer=100, n_head=2, d_model=64, d_ff=512, max_len=8)
weights = reference.random_forecaster(dataclasses.replace(config, n_layer=1), 0)
for i in range(config.n_layer):
    weights |= {name.replace("blocks.0", f"blocks.{i}"): w for name, w in weights.items() if "blocks.0" in name}
decoder = Decoder(config, weights, 1024)
first = decoder.prefill(np.ones((1024, 1, 5), np.float32))
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    decoder.generate(7)
    raise SystemExit("not interrupted")
except KeyboardInterrupt:
    pass
held = set(decoder.position.tolist())
assert len(held) == 1 and held < set(range(1, 8)), held
decoder.generate(1)
assert set(decoder.position.tolist()) == {held.pop() + 1}
"""
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@cpu_only
@pytest.mark.parametrize("num_threads", [1, 2])
def test_an_interrupted_path_goes_on_with_the_same_bits(num_threads):
    """Passes of one layer, each long enough to be stopped in the middle."""
    done = run_python(
        SCRIPT
        + f"""
config = dataclasses.replace(reference.SMALL_MODEL, n_layer=1, max_len=40)
weights = reference.random_forecaster(config, 0)
prefix = np.random.default_rng(0).standard_normal((2000, 2, 5), np.float32)

def decoder():
    made = Decoder(config, weights, len(prefix), num_threads={num_threads})
    made.prefill(prefix)
    return made

begin = time.perf_counter()
path, seconds = decoder().generate(30), time.perf_counter() - begin
interrupted = []
for share in np.linspace(0.1, 0.9, 12):
    cut = decoder()
    threading.Timer(share * seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        cut.generate(30)
        time.sleep(seconds)
    except KeyboardInterrupt:
        pass
    (position,) = set(cut.position.tolist())
    if position < 32:
        interrupted.append(position)
        assert np.array_equal(cut.generate(32 - position), path[:, position - 2:]), (interrupted, share)
assert interrupted
"""
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@cpu_only
def test_a_decoder_works_in_a_forked_child_and_in_its_parent():
    done = run_python(
        SCRIPT
        + """
decoder = decoder_for(100, batch=64, num_threads=3)
decoder.prefill(np.ones((64, 4, 5), np.float32))
decoder.generate(10)
child = os.fork()
path = decoder.generate(10)
expected = decoder_for(100, batch=64, num_threads=1)
expected.prefill(np.ones((64, 4, 5), np.float32))
same = np.array_equal(expected.generate(20)[:, 10:], path)
if child == 0:
    os._exit(0 if same else 1)
assert same
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    )
    assert done.returncode == 0, done.stderr
