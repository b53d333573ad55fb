"""Call everything that csrc/bind*.cpp binds with arguments that are valid, nearly valid and absurd.

    python tests/stress/fuzz_native.py --calls 1000000 --seed 0 --threads 1
    .ci/sanitize address --run tests/stress/fuzz_native.py --calls 1000000
    .ci/sanitize thread --run tests/stress/fuzz_native.py --calls 100000 --threads 4

A call must give an answer of the right shape (and of the right value, or leave the state that it should, where that is
cheap to tell), or raise one of REFUSALS with a text. Prints one row of JSON: calls `tried`; `silent`, answers that are
wrong and errors without a text or of another type; `crashed`, processes that died; `hung`, calls that took more than
5 s; `refused_clearly`. What is wrong goes to stderr with its seed. The exit status is 0 where nothing is.

Calls run in a forked process, so that a crash is counted and the next seed goes on. With several threads all use the
same objects, and what only one thread can tell of their state is not checked.
"""

import argparse
import json
import math
import mmap
import os
import random
import struct
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from tipl import _core

REFUSALS = (TypeError, ValueError, RuntimeError, MemoryError, OverflowError)
SLOW_SECONDS, HUNG_SECONDS = 5.0, 60.0
ABSURD = (
    -1,
    0,
    1,
    2,
    2**31 - 1,
    2**31,
    2**36,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    1.5,
    np.nan,
    np.inf,
    None,
    "x",
)
ABSURD += (True, b"", (), [1], {}, object, np.int64(-5), np.float32(2), np.zeros(()), 10**30)
MODEL = {"n_components": 3, "n_layer": 1, "n_head": 2, "d_model": 8, "d_ff": 8, "max_len": 12}
REFINERS: dict[str, Any] = {
    "hidden": 5,
    "num_signed": 3,
    "num_unsigned": 2,
    "num_kinds": 3,
    "bound": 5.0,
    "linear_gain": 0.3,
    "num_threads": 1,
}
ROLLOUTS = MODEL | {"diff_scale": 10.0, "out_scale": 0.1, "batch_size": 20, "num_tokens": 9, "num_threads": 1}
PPO = {"obs_dim": 3, "act_dim": 2, "hidden_sizes": [5], "activation": "tanh", "minibatch_size": 4, "update_epochs": 2}
PPO |= {"clip_coef": 0.2, "clip_coef_vf": None, "vf_coef": 0.5, "ent_coef": 0.0, "max_grad_norm": 0.5, "num_threads": 1}
PPO |= {"optimizer": "adam", "adam_eps": 1e-5, "normalize_advantage": True, "target_kl": None, "learn_log_std": True}
PPO |= {"discrete": False}


def ppo_update(*, obs_dim: Any, act_dim: Any, num_threads: Any, discrete: Any, **config: Any) -> _core.PpoUpdate:
    sizes = {"obs_dim": obs_dim, "act_dim": act_dim, "num_threads": num_threads, "discrete": discrete}
    return _core.PpoUpdate(**sizes, config=types.SimpleNamespace(**config))


class Wrong(Exception):
    """An answer that is not what it should be."""


class Fuzzer:
    """Objects of the engine, and calls on them. A method call_<names> calls what it is named for."""

    def __init__(self, seed: int, alone: bool) -> None:
        self.random, self.numbers, self.alone = random.Random(seed), np.random.default_rng(seed), alone
        self.spoil = 0.0  # the share of arguments of the present call that are not as they should be
        self.last = ""
        self.calls = [getattr(self, name) for name in dir(self) if name.startswith("call_")]
        self.pool, self.in_use = _core.ThreadPool(2), _core.InUse()
        self.sketches = [self.sketch(p=p) for p in (1, 20, 20, 300)]
        self.rows = [0] * len(self.sketches)
        self.decoders = [self.decoder(), self.decoder(dtype="int8", cache_dtype="bfloat16", num_threads=2)]
        self.rollouts = [_core.RolloutGradient(**ROLLOUTS), _core.RolloutGradient(**ROLLOUTS | {"num_threads": 2})]
        self.refiners = [_core.Refiner(**REFINERS), _core.Refiner(**REFINERS | {"num_threads": 2, "hidden": 1})]
        self.ppo = [ppo_update(**PPO), ppo_update(**PPO | {"num_threads": 2, "hidden_sizes": []})]
        self.choosing = [ppo_update(**PPO | {"act_dim": n, "discrete": True}) for n in (1, 3)]

    def one(self) -> None:
        self.spoil = self.random.choice((0.0, 0.1, 0.4))
        call = self.random.choice(self.calls)
        self.last = call.__name__
        call()

    # ---- arguments

    def off(self) -> bool:
        return self.random.random() < self.spoil

    def scalar(self, value: Any) -> Any:
        return self.random.choice(ABSURD) if self.off() else value

    def all_scalars(self, values: dict[str, Any]) -> dict[str, Any]:
        return {name: self.scalar(value) for name, value in values.items()}

    def array(self, *shape: int, dtype: Any = np.float32, most: int | None = None) -> Any:
        """Return an array of this shape, or something near it."""
        if most is None:
            array = self.numbers.standard_normal(shape).astype(dtype)
        else:
            array = self.numbers.integers(0, max(1, most), shape).astype(dtype)
        return self.random.choice(SPOILERS)(self, array) if self.off() else array

    def call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.last = (
            f"{name}({', '.join(map(described, args))}, {', '.join(f'{k}={described(v)}' for k, v in kwargs.items())})"
        )
        return function(*args, **kwargs)

    # ---- objects

    def sketch(self, p: int = 20, **params: Any) -> _core.RowSketch:
        settings = {
            "num_features": p,
            "range_size": min(p, 6),
            "test_size": 2 if p > 6 else 0,
            "seed": 1,
            "num_threads": 2,
        }
        return _core.RowSketch(**settings | {"origin": None, "directions": None} | params)

    def weights(self) -> dict[str, Any]:
        k, d, f, T = (MODEL[name] for name in ("n_components", "d_model", "d_ff", "max_len"))
        shapes = {"embed.weight": (d, 2 * k + 1), "embed.bias": (d,), "pos.weight": (T, d)}
        for name, rows, columns in (("qkv", 3 * d, d), ("proj", d, d), ("fc1", f, d), ("fc2", d, f)):
            shapes |= {f"blocks.0.{name}.weight": (rows, columns), f"blocks.0.{name}.bias": (rows,)}
        for name in ("blocks.0.norm1", "blocks.0.norm2", "norm"):
            shapes |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
        shapes |= {"head.weight": (k, d), "head.bias": (k,)}
        weights = {name: self.array(*shape) for name, shape in shapes.items()}
        if self.off():
            weights.pop(self.random.choice(list(weights)))
        return weights

    def decoder(self, **params: Any) -> _core.Decoder:
        settings = {"diff_scale": 1.0, "out_scale": 1.0, "dtype": "float32", "cache_dtype": "float32"}
        settings |= {"batch_size": 2, "cache_len": 10, "num_threads": 1}
        return _core.Decoder(weights=self.weights(), **MODEL | settings | params)

    # ---- engine

    def call_isa_lanes_available_cpus(self) -> None:
        right(_core.isa() in ("baseline", "avx2", "avx512", "avx512bf16") and _core.lanes() >= 4)
        right(_core.available_cpus() >= 1)

    def call_choose_isa(self) -> None:
        names = ["baseline", "avx2"]
        name = self.scalar(self.random.choice([None, *names]))
        right(self.call("choose_isa", _core.choose_isa, name, self.scalar(names)) in names)

    def call_philox4x32_normal4(self) -> None:
        counter, key = tuple(self.scalar(i) for i in range(4)), (self.scalar(1), self.scalar(2))
        right(len(self.call("philox4x32", _core.philox4x32, counter, key)) == 4)
        right(len(self.call("normal4", _core.normal4, self.scalar(1), self.scalar(2), self.scalar(3))) == 4)

    def call_ThreadPool(self) -> None:
        threads = self.scalar(self.random.randint(1, 3))
        right(self.call("ThreadPool", _core.ThreadPool, threads).size == threads)

    def call_owners_barriers_hold_sleeps_size(self) -> None:
        items = self.scalar(self.random.randint(0, 9))
        if isinstance(items, int) and items > 10**6:
            items = -items  # so many are really counted
        owners = self.call("owners", self.pool.owners, items, self.scalar([]))
        right(owners.shape == (items,) and self.pool.size == 2)
        right(self.call("barriers_hold", self.pool.barriers_hold, self.random.randint(-1, 3)))
        seconds = self.random.choice([-1.0, 0.0, 0.001, 61.0, math.inf, math.nan])
        right(self.call("sleeps", self.pool.sleeps, seconds) == seconds)

    def call_InUse_Turn(self) -> None:
        objects = self.scalar([self.in_use, _core.InUse()])
        turn = self.call("Turn", _core.Turn, objects, self.scalar("here"), self.scalar("it"))
        with turn:
            if self.alone and self.in_use in (objects if isinstance(objects, list) else []):
                refused(lambda: _core.Turn([self.in_use], "here", "it").__enter__())

    def call_ReadAhead_want(self) -> None:
        reader = self.call("ReadAhead", _core.ReadAhead, self.array(self.random.randint(0, 300), 20))
        self.call("want", reader.want, self.scalar(self.random.randint(0, 10**5)))

    # ---- sketches

    def call_RowSketch(self) -> None:
        p = self.random.randint(1, 40)
        size = self.random.randint(1, p)
        params = {"num_features": p, "range_size": size, "test_size": 0, "seed": 1, "num_threads": 1}
        params = self.all_scalars(params | {"choose_origin": False})
        origin = self.array(p) if self.off() else None
        directions = self.array(size, p) if self.off() else None
        made = self.call("RowSketch", _core.RowSketch, **params, origin=origin, directions=directions)
        right(made.num_rows() == 0 and made.exact)

    def pick(self) -> tuple[int, _core.RowSketch]:
        index = self.random.randrange(len(self.sketches))
        if self.rows[index] > 2000 or self.random.random() < 0.01:
            choose = self.random.random() < 0.5
            self.sketches[index] = self.sketch(p=self.sketches[index].num_features, choose_origin=choose)
            self.rows[index] = 0
        return index, self.sketches[index]

    def call_partial_fit_num_rows(self) -> None:
        index, sketch = self.pick()
        n = self.random.choice((1, 1, 2, 7, 100, 300))
        X, all_or_none = self.array(n, sketch.num_features), self.random.random() < 0.7
        try:
            self.call("partial_fit", sketch.partial_fit, X, self.scalar(0), all_or_none)
            self.rows[index] += len(X)
        except REFUSALS:
            if not all_or_none:
                self.rows[index] = sketch.num_rows()
            raise
        finally:
            right(not self.alone or sketch.num_rows() == self.rows[index], "rows")

    def call_check_rows(self) -> None:
        _, sketch = self.pick()
        before = self.scalar(1.0)
        after = self.call("check_rows", sketch.check_rows, self.array(9, sketch.num_features), self.scalar(0), before)
        right(isinstance(after, float))

    def call_partial_fit_together(self) -> None:
        sketches = [self.sketch(p=p) for p in (3, 5)]
        arguments = (self.scalar(sketches), self.scalar([self.scalar(0), self.scalar(2)]), self.array(9, 7))
        try:
            self.call("partial_fit_together", _core.partial_fit_together, *arguments, self.scalar(0), True)
        finally:
            right(len({sketch.num_rows() for sketch in sketches}) == 1, "rows of groups")

    def call_merge(self) -> None:
        index, one = self.pick()
        other_index = self.random.choice((1, 2))
        other = self.sketches[other_index]
        try:
            self.call("merge", one.merge, other if self.random.random() < 0.9 else self.scalar(None))
            self.rows[index] += self.rows[other_index]
        finally:
            right(not self.alone or one.num_rows() == self.rows[index], "rows")

    def call_settle_snapshot(self) -> None:
        index, sketch = self.pick()
        self.call("settle", sketch.settle)
        copy = self.call("snapshot", sketch.snapshot, self.scalar(True))
        right(not self.alone or copy.num_rows() == self.rows[index])

    def call_apply(self) -> None:
        _, sketch = self.pick()
        out = self.call("apply", sketch.apply, self.array(self.random.randint(0, 40), sketch.num_features))
        right(out.ndim == 2 and out.shape[1] == sketch.range_size + sketch.test_size)

    def call_exact_rows_exact_origin_range_rows_pending(self) -> None:
        index, sketch = self.pick()
        p = sketch.num_features
        right(sketch.exact_rows().shape[1] == p and sketch.pending.shape[1] == p)
        right(sketch.exact_origin().shape in ((0,), (p,)) and sketch.origin.shape in ((0,), (p,)))
        rows = sketch.range_rows()
        right(rows.shape[1] == sketch.range_size and (not self.alone or len(rows) == self.rows[index]))

    def call_gram_co_range_row_sum_squares_directions_origin_exact_directed(self) -> None:
        _, sketch = self.pick()
        p, size = sketch.num_features, sketch.range_size + sketch.test_size + 1
        right(sketch.gram.shape == (size, size) and sketch.co_range.shape == (size, p) and sketch.row_sum.shape == (p,))
        right(isinstance(sketch.squares, float) and sketch.directions.shape == (0, p) and sketch.origin.size in (0, p))
        right(isinstance(sketch.exact, bool) and not sketch.directed)

    def call_combine(self) -> None:
        _, sketch = self.pick()
        r, size = self.random.randint(0, 9), sketch.range_size + sketch.test_size + 1
        right(self.call("combine", sketch.combine, self.array(size, r, dtype=np.float64)).ndim == 2)
        n = self.random.randint(0, 40)
        out = self.call("combine", _core.combine, self.array(n, 20), self.array(n, r, dtype=np.float64), self.scalar(2))
        right(out.ndim == 2)

    def call_restore_num_features_range_size_test_size(self) -> None:
        index, sketch = self.pick()
        p, size = sketch.num_features, sketch.range_size + sketch.test_size + 1
        n, pending = self.random.randint(0, 9), self.random.choice((0, 1, 256, 257))
        sums = {"co_range": self.array(size, p, dtype=np.float64), "gram": self.array(size, size, dtype=np.float64)}
        rows = {"range_rows": self.array(n, sketch.range_size), "pending": self.array(pending, p)}
        try:
            self.call("restore", sketch.restore, squares=self.scalar(1.0), **sums, **rows)
        finally:
            self.rows[index] = sketch.num_rows()
        right(not self.alone or self.rows[index] == len(rows["range_rows"]) + len(rows["pending"]))

    def call_check_finite(self) -> None:
        self.call(
            "check_finite", _core.check_finite, self.scalar("here"), self.array(9, 20), self.scalar(2), self.scalar(0)
        )

    def call_products(self) -> None:
        n, m, p = (self.random.randint(0, 40) for _ in range(3))
        x, y = self.array(n, p), self.scalar(None) if self.random.random() < 0.3 else self.array(m, p)
        origin = self.array(p) if self.random.random() < 0.5 else None
        out = self.call("products", _core.products, self.scalar("here"), x, y, origin, self.scalar(2))
        a, b = (np.asarray(rows, np.float64) - (0 if origin is None else origin) for rows in (x, x if y is None else y))
        with np.errstate(all="ignore"):
            exact = a @ b.T
            scale = np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
        right(out.shape == exact.shape)
        known = np.isfinite(exact) & np.isfinite(scale)
        right((np.abs(out[known] - exact[known]) <= 1e-9 * scale[known] + 1e-300).all(), "values")

    # ---- decoder

    def call_Decoder(self) -> None:
        settings = {"diff_scale": 1.0, "out_scale": 1.0, "dtype": "float32", "cache_dtype": "bfloat16"}
        settings |= {"batch_size": 2, "cache_len": 10, "num_threads": 1}
        params = self.all_scalars(MODEL | settings)
        if params["batch_size"] == 2**24:
            params["batch_size"] = 2
        made = self.call("Decoder", _core.Decoder, weights=self.weights(), **params)
        right(made.position.tolist() == [0] * made.batch_size and made.max_len <= 12 and made.num_threads >= 1)

    def call_prefill_step_generate_reset_position_batch_size_max_len_num_threads(self) -> None:
        decoder, B, k = self.random.choice(self.decoders), 2, MODEL["n_components"]
        if self.random.random() < 0.3:
            decoder.reset()
        t = self.random.randint(0, 11)
        lengths = self.array(B, dtype=np.int64, most=t + 1) if self.random.random() < 0.5 else None
        step = self.random.choice(
            (
                lambda: self.call("prefill", decoder.prefill, self.array(B, t, k), lengths),
                lambda: self.call("step", decoder.step, self.array(B, k)),
                lambda: self.call("generate", decoder.generate, self.array(B, dtype=np.int64, most=4)),
            )
        )
        before = decoder.position
        try:
            out = step()
        except REFUSALS:
            right(not self.alone or (decoder.position == before).all(), "position after a refusal")
            raise
        right(out.shape[0] == B and out.shape[-1] == k)
        right(decoder.position.shape == (B,) and (decoder.position <= decoder.max_len).all())
        right(decoder.batch_size == B and decoder.num_threads in (1, 2))

    # ---- training

    def call_RolloutGradient(self) -> None:
        made = self.call("RolloutGradient", _core.RolloutGradient, **self.all_scalars(ROLLOUTS))
        right(made.num_params >= 1)

    def call_forward_backward_num_params(self) -> None:
        rollout, B, T = self.random.choice(self.rollouts), self.random.randint(0, 24), self.random.randint(0, 10)
        horizon, params = self.random.choice((0, 1, 3)), self.array(rollout.num_params)
        settings = {"horizon": self.scalar(horizon), "dropout": self.scalar(0.3), "seed": self.scalar(5)}
        ends = self.array(B, dtype=np.int64, most=20)
        predicted = self.call("forward", rollout.forward, params, self.array(B, T, 3), ends, **settings)
        right(predicted.ndim == 3 and predicted.shape[2] == 3)
        grad = self.call("backward", rollout.backward, params, self.array(B, horizon or T, 3))
        right(grad.shape == (rollout.num_params,))

    def call_Refiner(self) -> None:
        made = self.call("Refiner", _core.Refiner, **self.all_scalars(REFINERS))
        right(made.num_params >= 1)

    def call_answer_loss(self) -> None:
        refiner, R, m = self.random.choice(self.refiners), self.random.randint(0, 4), self.random.randint(0, 40)
        J = self.random.randint(0, 3)
        inputs = [
            self.array(refiner.num_params),
            self.array(R, m, 5),
            self.array(R, m, dtype=np.int64, most=4 if self.off() else 3),
            self.array(R, J, m),
            self.array(R, J, 3),
        ]
        answers = self.call("answer", refiner.answer, *inputs)
        right(answers.shape == inputs[3].shape)
        errors, grad = self.call("loss", refiner.loss, *inputs, self.array(R, m), self.array(R, m))
        right(errors.shape == (R,) and grad.shape == (refiner.num_params,))

    # ---- PPO

    def call_PpoUpdate(self) -> None:
        made = self.call("PpoUpdate", ppo_update, **self.all_scalars(PPO))
        right(made.num_params >= 1)

    def call_mean_actions_values_num_params(self) -> None:
        ppo, N, R = self.random.choice(self.ppo), self.random.randint(0, 3), self.random.randint(0, 9)
        P = ppo.num_params + self.random.randint(0, 2)
        sizes = {"act_dim": self.scalar(2), "activation": self.random.choice(["tanh", "relu", "elu", "no"])}
        sizes["discrete"] = self.scalar(self.random.choice([False, True]))
        sizes["hidden_sizes"] = self.random.choice([[4], [], [5, 1], [0], [2**40], [3] * 2000])
        actions = self.call("mean_actions", _core.mean_actions, self.array(N, P), self.array(N, R, 3), **sizes)
        values = self.call("values", ppo.values, self.array(N, P), self.array(N, R, 3))
        right(actions.ndim == 3 and actions.shape[2] == sizes["act_dim"] and values.ndim == 2)

    def call_update(self) -> None:
        N, T, number = self.random.randint(0, 3), 4 * self.random.randint(0, 3), self.random.randrange(4)
        is_discrete, ppo = number >= 2, (self.ppo + self.choosing)[number]
        # Indices are below 3, too many for the one action of self.choosing[0] unless they are all 0.
        actions = self.array(N, T, 1, most=3) if is_discrete else self.array(N, T, 2)
        P = ppo.num_params
        state = {name: self.array(N, P) for name in ("params", "first_moments")} | {
            "second_moments": np.ones((N, P), "f4")
        }
        scalars = {name: self.array(N, T) for name in ("log_probs", "advantages", "returns", "values")}
        steps = {"observations": self.array(N, T, 3), "actions": actions}
        order = {"order": self.array(N, 2, T, dtype=np.int32, most=T)}
        counts = {"num_updates": self.array(N, dtype=np.int64, most=9), "learning_rate": self.scalar(1e-3)}
        before = np.array(state["params"], copy=True)
        try:
            stats = self.call("update", ppo.update, **state, **scalars, **steps, **order, **counts)
        except REFUSALS:
            right(same(before, state["params"]), "parameters after a refusal")
            raise
        right(stats.ndim == 2 and stats.shape[1] == (5 if is_discrete else 4))


# ---- arrays that are not as they should be

WIDE = np.lib.stride_tricks.as_strided


def spoil_value(fuzzer: Fuzzer, array: np.ndarray) -> Any:
    if array.size and array.dtype.kind == "f":
        array.flat[fuzzer.random.randrange(array.size)] = fuzzer.random.choice(
            (np.nan, np.inf, -np.inf, 3e38, 1e-45, 1e16)
        )
    elif array.size:
        array.flat[fuzzer.random.randrange(array.size)] = fuzzer.random.choice((-1, 2**31 - 1, -(2**31)))
    return array


def misaligned(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"x" + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


SPOILERS: tuple[Callable[[Fuzzer, np.ndarray], Any], ...] = (
    spoil_value,
    spoil_value,
    lambda fuzzer, array: array.astype(fuzzer.random.choice(("f8", "f2", "i4", "u1", "?", "c8", ">f4", "O", "S3"))),
    lambda fuzzer, array: array[..., :-1],
    lambda fuzzer, array: np.concatenate([array, array]),
    lambda fuzzer, array: array[None],
    lambda fuzzer, array: array.T,
    lambda fuzzer, array: array[::-1],
    lambda fuzzer, array: array[..., ::-1],
    lambda fuzzer, array: np.repeat(array, 2, axis=-1)[..., ::2],
    lambda fuzzer, array: np.asfortranarray(array),
    lambda fuzzer, array: np.broadcast_to(array[:1], array.shape) if len(array) else array,
    lambda fuzzer, array: (
        WIDE(array, (2**40, *array.shape[1:]), (0, *array.strides[1:]), writeable=False)
        if array.size and array.ndim == 3
        else array
    ),
    lambda fuzzer, array: misaligned(array),
    lambda fuzzer, array: read_only(array),
    lambda fuzzer, array: array[:0],
    lambda fuzzer, array: array.tolist(),
    lambda fuzzer, array: fuzzer.random.choice(ABSURD),
)


# ---- judging


def right(ok: bool, what: str = "answer") -> None:
    if not ok:
        raise Wrong(what)


def refused(work: Callable[[], Any]) -> None:
    try:
        work()
    except RuntimeError:
        return
    raise Wrong("not refused")


def same(a: Any, b: Any) -> bool:
    return a.tobytes() == np.array(b, copy=True).tobytes() if isinstance(b, np.ndarray) else True


def described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"<{value.dtype} {value.shape} strides {value.strides}>"
    return f"<{len(value)} weights>" if isinstance(value, dict) and value else repr(value)[:60]


def bound_names() -> set[str]:
    """Return the name of every function, class and method in the engine."""
    names = {name for name in dir(_core) if not name.startswith("_")}
    for name in list(names):
        if isinstance(getattr(_core, name), type):
            names |= {method for method in vars(getattr(_core, name)) if not method.startswith("_")}
    return names


TRIED, SILENT, HUNG, REFUSED, BUSY = range(5)


class Counts:
    """Numbers in memory that a process shares with the one that forked it."""

    def __init__(self) -> None:
        self.memory, self.lock = mmap.mmap(-1, 8 * 5), threading.Lock()

    def __getitem__(self, which: int) -> int:
        return int(struct.unpack_from("q", self.memory, 8 * which)[0])

    def add(self, which: int) -> None:
        with self.lock:
            struct.pack_into("q", self.memory, 8 * which, self[which] + 1)


def work(counts: Counts, fuzzer: Fuzzer, seed: int, calls: int) -> None:
    """Make calls until there are so many of all processes and threads."""
    while counts[TRIED] < calls:
        counts.add(TRIED)
        begin = time.monotonic()
        try:
            fuzzer.one()
        except REFUSALS as error:
            counts.add(REFUSED if str(error) else SILENT)
            if not str(error):
                print(f"seed {seed}: {fuzzer.last}: {type(error).__name__} without a text", file=sys.stderr)
        except Exception as error:
            counts.add(SILENT)
            print(f"seed {seed}: {fuzzer.last}: {type(error).__name__}: {error}", file=sys.stderr)
        if time.monotonic() - begin > SLOW_SECONDS:
            counts.add(HUNG)
            print(f"seed {seed}: {fuzzer.last}: {time.monotonic() - begin:.1f} s", file=sys.stderr)


def run_child(counts: Counts, seed: int, calls: int, num_threads: int) -> None:
    first = Fuzzer(seed, num_threads == 1)
    others = []
    for number in range(1, num_threads):
        other = Fuzzer(seed + 1000 * number, False)
        for name in ("pool", "in_use", "sketches", "rows", "decoders", "ppo", "choosing"):
            setattr(other, name, getattr(first, name))
        others.append(threading.Thread(target=work, args=(counts, other, seed, calls)))
    for thread in others:
        thread.start()
    work(counts, first, seed, calls)
    for thread in others:
        thread.join()


def watch(child: int, counts: Counts) -> str:
    """Return how the process ended: "done", "crashed", or "hung" where it made no call for a minute."""
    tried, since = -1, time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return "done" if status == 0 else "crashed"
        if counts[TRIED] != tried:
            tried, since = counts[TRIED], time.monotonic()
        elif time.monotonic() - since > HUNG_SECONDS:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return "hung"
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    missing = bound_names() - {name for call in dir(Fuzzer) for name in call_names(call)}
    if missing:
        raise SystemExit(f"no call of {', '.join(sorted(missing))}")
    counts, seed, ends = Counts(), args.seed, {"crashed": 0, "hung": 0}
    while counts[TRIED] < args.calls:
        child = os.fork()
        if child == 0:
            run_child(counts, seed, args.calls, args.threads)
            sys.stderr.flush()
            os._exit(0)
        end = watch(child, counts)
        if end != "done":
            ends[end] += 1
            print(f"seed {seed}: {end} at call {counts[TRIED]}", file=sys.stderr)
        seed += 1
    row = {"campaign": "fuzz_native", "command": " ".join(sys.argv), "tried": counts[TRIED], "silent": counts[SILENT]}
    row |= {"crashed": ends["crashed"], "hung": ends["hung"] + counts[HUNG], "refused_clearly": counts[REFUSED]}
    print(json.dumps(row))
    return 1 if row["silent"] or row["crashed"] or row["hung"] else 0


def call_names(call: str) -> set[str]:
    """Return the names that a method call_<names> may stand for: every run of its words."""
    words = call.removeprefix("call_").split("_") if call.startswith("call_") else []
    return {"_".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}


if __name__ == "__main__":
    sys.exit(main())
