"""The engine's objects under threads, signal handlers and forks, in pickles, and as the interpreter ends."""

import contextlib
import copy
import pickle
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import joblib
import numpy as np
import pytest
import reference
from processes import run_python, stopped
from reference import SMALL_MODEL
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimators_pickle
from svd_checks import random_rows, results, stream

from tipl import _core
from tipl.forecasting.decoder import Decoder
from tipl.subspace.grouped_svd import GroupedSVD
from tipl.subspace.running_gram import RunningGram, gram
from tipl.subspace.streaming_svd import StreamingSVD

GROUPS = {"a": (0, 4), "b": (3, 30)}
ENDLESS = np.lib.stride_tricks.as_strided(np.ones((1, 400), np.float32), (2**40, 400), (0, 4))


def decoder(batch: int = 1, **params: Any) -> Decoder:
    return Decoder(SMALL_MODEL, reference.random_forecaster(SMALL_MODEL, 0), batch, **params)


def ppo(num_threads: int = 1, obs_dim: int = 5) -> _core.PpoUpdate:
    settings = {"clip_coef": 0.2, "clip_coef_vf": None, "vf_coef": 0.5, "ent_coef": 0.0, "max_grad_norm": 0.5}
    settings |= {"optimizer": "adam", "adam_eps": 1e-5, "normalize_advantage": True, "target_kl": None}
    settings |= {"minibatch_size": 64, "update_epochs": 1000, "learn_log_std": True}
    settings |= {"hidden_sizes": [64, 64], "activation": "tanh"}
    config = types.SimpleNamespace(**settings)
    return _core.PpoUpdate(obs_dim=obs_dim, act_dim=2, config=config, num_threads=num_threads)


def ppo_arrays(update: _core.PpoUpdate, epochs: int = 1000, steps: int = 2048) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    P = update.num_params
    scalars = {name: rng.standard_normal((1, steps), np.float32) for name in ("log_probs", "advantages", "returns")}
    return scalars | {
        "params": rng.standard_normal((1, P), np.float32) * np.float32(0.1),
        "first_moments": np.zeros((1, P), np.float32),
        "second_moments": np.zeros((1, P), np.float32),
        "num_updates": np.zeros(1, np.int64),
        "observations": rng.standard_normal((1, steps, 5), np.float32),
        "actions": rng.standard_normal((1, steps, 2), np.float32),
        "values": rng.standard_normal((1, steps), np.float32),
        "order": np.tile(np.arange(steps, dtype=np.int32), (1, epochs, 1)),
        "learning_rate": 1e-6,
    }


# ---- threads


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads that take turns a thousand times as often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(work: Callable[[], Any], count: int = 4) -> None:
    errors: list[BaseException] = []

    def caught() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=caught) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@pytest.mark.parametrize("make", [lambda: StreamingSVD(3, num_threads=2), lambda: GroupedSVD(GROUPS, 2, num_threads=2)])
def test_no_row_is_lost_where_threads_make_the_first_call_together(make, eager_threads):
    rows = random_rows(400, 30)
    for _ in range(5):
        estimator = make()
        in_threads(lambda estimator=estimator: stream(estimator, rows, 50))
        parts = estimator.estimators_.values() if isinstance(estimator, GroupedSVD) else [estimator]
        assert [part.n_samples_seen_ for part in parts] == [1600] * len(parts)
        assert len(estimator.coordinates_) == 1600


def test_merging_each_other_in_threads_loses_nothing_and_ends(eager_threads):
    rows = random_rows(300, 30)
    one, other = (StreamingSVD(3, num_threads=1).fit(rows) for _ in range(2))
    turns = iter([(one, other), (other, one)])

    def merge() -> None:
        first, second = next(turns)
        first.merge(second)

    in_threads(merge, 2)
    assert sorted([one.n_samples_seen_, other.n_samples_seen_]) == [600, 900]


def test_rows_that_threads_append_are_all_in_the_gram_matrix(eager_threads):
    rows = random_rows(20, 30)
    running = RunningGram(num_threads=1)
    in_threads(lambda: [running.append(row) for row in rows])
    assert running.gram.shape == (80, 80)
    assert np.isclose(running.gram.trace(), 4 * np.linalg.norm(rows.astype(np.float64)) ** 2)


def until_it_is_not_refused(work: Callable[[], Any]) -> None:
    is_refused = True
    while is_refused:
        with contextlib.suppress(RuntimeError):
            work()
            is_refused = False


def test_a_second_call_on_an_object_of_the_engine_is_refused():
    update = ppo()
    arrays = ppo_arrays(update, epochs=1000, steps=64)
    sketch = _core.RowSketch(
        num_features=400, range_size=6, test_size=4, seed=1, num_threads=1, origin=None, directions=None
    )
    many = ENDLESS[: 1 << 16]
    for work, use, message in (
        (lambda: update.update(**arrays), lambda: update.values(arrays["params"], arrays["observations"]), "update"),
        (lambda: sketch.partial_fit(many, 0, False), sketch.num_rows, "sketch"),
        (lambda: sketch.partial_fit(many, 0, False), lambda: sketch.gram, "sketch"),
    ):
        worker = threading.Thread(target=until_it_is_not_refused, args=(work,))
        worker.start()
        with pytest.raises(RuntimeError, match=rf": the {message} is in use by another call$"):
            while worker.is_alive():
                use()
                time.sleep(0.001)  # or the worker would hardly ever find the object free
        worker.join()


# ---- signals


@pytest.mark.parametrize(
    ("work", "use"),
    [
        (lambda svd: svd.partial_fit(ENDLESS), lambda svd: svd.n_samples_seen_),
        (lambda svd: svd.fit(ENDLESS), lambda svd: svd.partial_fit(ENDLESS[:5])),
        (lambda svd: svd.fit(ENDLESS), lambda svd: svd.save("never")),
        (lambda svd: svd.fit(ENDLESS), lambda svd: svd.merge(StreamingSVD(3).fit(ENDLESS[:5]))),
        (lambda svd: svd.fit(ENDLESS), pickle.dumps),
    ],
)
def test_a_signal_handler_that_uses_an_estimator_in_use_is_refused(work, use):
    estimator = StreamingSVD(3, num_threads=1).fit(ENDLESS[:300])
    previous = signal.signal(signal.SIGALRM, lambda *_: use(estimator))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(RuntimeError, match=r": the estimator is in use by another call$"):
            work(estimator)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert estimator.n_samples_seen_ >= 300
    assert estimator.partial_fit(ENDLESS[:5]).components_.shape == (3, 400)


def sketch_of(num_features: int) -> _core.RowSketch:
    return _core.RowSketch(
        num_features=num_features, range_size=2, test_size=1, seed=1, num_threads=1, origin=None, directions=None
    )


ENDLESS_WORK = {
    "fit": lambda: StreamingSVD(3, num_threads=1).fit(ENDLESS),
    "partial_fit": lambda: StreamingSVD(3, num_threads=2).partial_fit(ENDLESS),
    "partial_fit of groups": lambda: GroupedSVD(GROUPS, 2, num_threads=1).partial_fit(ENDLESS),
    "transform": lambda: StreamingSVD(3, num_threads=2).fit(ENDLESS[:300]).transform(ENDLESS[: 1 << 22]),
    "gram": lambda: gram(ENDLESS[:20000], num_threads=1),
    "check_finite": lambda: _core.check_finite("test", ENDLESS, 2),
    "a sketch of many columns": lambda: [sketch_of(1 << 24) for _ in range(1000)],
    "update": lambda: (lambda update: update.update(**ppo_arrays(update)))(ppo()),
    "update of one trial on two threads": lambda: (lambda update: update.update(**ppo_arrays(update)))(ppo(2)),
    "pool": lambda: _core.ThreadPool(2).barriers_hold(2**31 - 1),
}


@pytest.mark.parametrize("work", list(ENDLESS_WORK))
def test_ctrl_c_reaches_every_loop(work):
    stopped(ENDLESS_WORK[work], 0.1)


def test_ctrl_c_is_not_lost_where_the_work_is_done_before_it_can_stop():
    pool = _core.ThreadPool(2)
    stopped(lambda: pool.sleeps(0.4), 0.1)
    assert pool.sleeps(0.0) == 0.0


def test_interrupted_groups_have_taken_equally_many_rows():
    grouped = GroupedSVD(GROUPS, 2, num_threads=1).partial_fit(ENDLESS[:300])
    seconds, seen = 0.05, {300}
    while seen == {300}:  # so far it has only looked at the rows
        stopped(lambda: grouped.partial_fit(ENDLESS[: 1 << 20]), seconds)
        seen = {part.n_samples_seen_ for part in grouped.estimators_.values()}
        seconds *= 2
    assert len(seen) == 1


# ---- forks


SCRIPT = """
import os, signal, threading, time
import numpy as np, reference
from tipl.subspace.streaming_svd import StreamingSVD
from tipl.forecasting.decoder import Decoder
rows = np.lib.stride_tricks.as_strided(np.ones((1, 400), np.float32), (2**40, 400), (0, 4))
svd = StreamingSVD(3, num_threads=2).fit(rows[:300])

def refused(use, text):
    try:
        use()
    except RuntimeError as error:
        assert text in str(error), error
        return True

def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


@pytest.mark.slow
def test_what_another_thread_used_during_a_fork_is_refused_in_the_child():
    done = run_python(
        SCRIPT
        + """
threading.Thread(target=svd.partial_fit, args=(rows,), daemon=True).start()
time.sleep(0.2)
child = os.fork()
if child == 0:
    signal.alarm(20)
    uses = (lambda: svd.n_samples_seen_, lambda: svd.fit(rows[:5]), lambda: svd.components_)
    os._exit(0 if all(refused(use, "in use when this process was forked") for use in uses) else 1)
assert exit_code(child) == 0
"""
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_signal_handler_that_forks_ends_the_call_in_the_child_alone():
    done = run_python(
        SCRIPT
        + """
children = []
signal.signal(signal.SIGALRM, lambda *_: children.append(os.fork()))
signal.setitimer(signal.ITIMER_REAL, 0.1)
forked = refused(lambda: svd.partial_fit(rows[:1_500_000]), "forked this process in the middle of a call")
if children == [0]:
    os._exit(0 if forked and refused(lambda: svd.n_samples_seen_, "in use when this process was forked") else 1)
assert not forked and exit_code(children[0]) == 0
assert svd.n_samples_seen_ == 1_500_300

decoder = Decoder(reference.SMALL_MODEL, reference.random_forecaster(reference.SMALL_MODEL, 0), 64, num_threads=2)
decoder.prefill(np.ones((64, 4, 5), np.float32))
children.clear()
signal.setitimer(signal.ITIMER_REAL, 0.05)
while not children:
    forked = refused(lambda: decoder.generate(30), "forked this process in the middle of a call")
    if not children:
        decoder.reset(); decoder.prefill(np.ones((64, 4, 5), np.float32))
if children == [0]:
    os._exit(0)
assert not forked and exit_code(children[0]) == 0
"""
    )
    assert done.returncode == 0, done.stderr


# ---- the interpreter's end


@pytest.mark.slow
@pytest.mark.parametrize(
    "work",
    [
        "StreamingSVD(4, num_threads=2).fit(rows)",
        "gram(rows[:300], num_threads=1)",
        "decoder.reset(), decoder.prefill(prefix), decoder.generate(50)",
    ],
)
def test_a_daemon_thread_in_the_engine_does_not_abort_the_end_of_the_interpreter(work):
    done = run_python(
        f"""
import threading, time
import numpy as np, reference
from tipl.forecasting.decoder import Decoder
from tipl.subspace.running_gram import gram
from tipl.subspace.streaming_svd import StreamingSVD
rows, prefix = np.ones((4000, 400), np.float32), np.ones((8, 4, 5), np.float32)
decoder = Decoder(reference.SMALL_MODEL, reference.random_forecaster(reference.SMALL_MODEL, 0), 8, num_threads=2)
begun = threading.Event()
def work():
    while True:
        {work}
        begun.set()
threading.Thread(target=work, daemon=True).start()
assert begun.wait(60)
"""
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stderr == ""


# ---- pickles and copies


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


COPIES = {"pickle": pickled, "copy": copy.copy, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("copied", list(COPIES))
@pytest.mark.parametrize("n", [100, 700])
@pytest.mark.parametrize("params", [{}, {"center": True}, {"origin": np.full(60, 2, np.float32)}, {"passes": 2}])
def test_a_copy_of_an_estimator_is_equal_to_the_bit_and_goes_on_alone(copied, n, params):
    rows = random_rows(n + 300, 60)
    estimator = StreamingSVD(4, num_threads=1, **params).fit(rows[:n])
    before = results(estimator)
    other = COPIES[copied](estimator)
    assert results(other) == before
    assert str(other.get_params()) == str(estimator.get_params())
    if estimator.passes == 1:
        other.partial_fit(rows[n:])
        assert results(other) == results(copy.deepcopy(estimator).partial_fit(rows[n:]))
    other.fit(rows[n:])
    assert results(estimator) == before


@pytest.mark.parametrize("copied", list(COPIES))
def test_copies_of_groups_and_of_a_running_gram_go_on_alone(copied):
    rows = random_rows(300, 30)
    grouped, running = GroupedSVD(GROUPS, 2).fit(rows), RunningGram().append(rows[:5])
    coordinates, products = grouped.coordinates_, running.gram
    others = COPIES[copied](grouped).partial_fit(rows), COPIES[copied](running).append(rows[5:9])
    assert np.array_equal(grouped.coordinates_, coordinates)
    assert np.array_equal(running.gram, products)
    assert len(others[0].coordinates_) == 600
    assert np.array_equal(others[1].gram, running.append(rows[5:9]).gram)


def test_an_unfitted_estimator_is_pickled_too():
    assert pickled(StreamingSVD(4, seed=3)).fit(random_rows(9, 9)).n_samples_seen_ == 9


def test_scikit_learn_finds_its_pickles_right(tmp_path):
    check_estimators_pickle("StreamingSVD", StreamingSVD(1))
    check_estimators_pickle("StreamingSVD", StreamingSVD(1), readonly_memmap=True)
    rows = random_rows(400, 40)
    pipeline = Pipeline([("scale", StandardScaler()), ("svd", StreamingSVD(3))]).fit(rows)
    joblib.dump(pipeline, tmp_path / "pipeline.joblib")
    assert np.array_equal(joblib.load(tmp_path / "pipeline.joblib").transform(rows), pipeline.transform(rows))


@pytest.mark.parametrize("copied", list(COPIES))
def test_a_decoder_is_not_copied(copied):
    with pytest.raises(TypeError, match=r"^a Decoder cannot be pickled or copied; make another one with "):
        COPIES[copied](decoder())


# ---- sizes out of all proportion


def test_more_memory_than_the_machine_has_is_refused_at_once():
    with pytest.raises(MemoryError, match=r"^an array needs .* GB, and this machine has .*"):
        sketch_of(2**40)
    with pytest.raises(MemoryError, match=r"^an array needs .* GB, and this machine has .*"):
        _core.products("test", ENDLESS[: 1 << 30], None, None, 1)
    with pytest.raises(ValueError, match=r"test_size must lie in \[0, 1024\], got 1099511627776"):
        _core.RowSketch(
            num_features=9, range_size=2, test_size=2**40, seed=1, num_threads=1, origin=None, directions=None
        )
    with pytest.raises(ValueError, match=r"^PpoUpdate: obs_dim must be <= 16777216, got 1099511627776$"):
        ppo(obs_dim=2**40)
