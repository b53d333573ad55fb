"""What a training loop of one's own gives to `Recorder.log` and gets back from `Recorder.restore`."""

import random
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tipl
from tipl.files.sealed import Arrays, load_arrays, save_arrays
from tipl.storing.state_tree import decode, encode, is_tree
from tipl.storing.store import Store

STATE = "training_state/state.safetensors"

TREES = [
    None, True, 3, 2**127 + 1, 0.1, float("nan"), float("-inf"), "text", [], (), {}, [1, (2, [3.0])],
    {1: "a", None: (), "": {}}, deque([1, 2], maxlen=3), deque(["a"]), np.zeros((0, 4)), np.array(True),
    np.arange(6, dtype=np.uint16).reshape(2, 3).T, np.float32(0.1), np.float64(np.nan), np.int64(-1),
    np.array([["a", "bcd"]]), np.array([b"a"]), np.array([], "U3"), np.str_("a"),
    torch.arange(4.0)[::2], torch.tensor(2), torch.zeros(0), torch.tensor([True]),
    torch.tensor([1.5, float("nan")], dtype=torch.bfloat16), torch.ones(2, dtype=torch.float8_e4m3fn),
]  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (np.ndarray, np.generic)):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and repr(a) == repr(b)
    return type(a) is type(b) and repr(a) == repr(b) and getattr(a, "maxlen", 0) == getattr(b, "maxlen", 0)


@pytest.mark.parametrize("value", TREES, ids=repr)
def test_trees_come_back(value: Any, tmp_path: Path) -> None:
    arrays: Arrays = {}
    assert is_tree(value)
    tree = encode(value, arrays, "x")
    save_arrays(tmp_path / "a", arrays, {"tree": tree})
    found, record = load_arrays(tmp_path / "a", "test")
    assert same(value, decode(record["tree"], found))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, {2}]}, r"x\['a'\]\[1\] must be a tensor, an array, a plain value or a tree of these, got set"),
        ({(1, 2): 3}, "x must be .* got dict"),
        (np.array([{}]), "x must be .* got ndarray"),
        (torch.zeros(1, dtype=torch.complex64), "x must be .* got Tensor"),
        (np.longdouble(1), "x must be .* got longdouble"),
        (Path("a"), "x must be .* got PosixPath"),
    ],
)
def test_other_values_are_refused(value: Any, message: str) -> None:
    assert not is_tree(value)
    with pytest.raises(TypeError, match=message):
        encode(value, {}, "x")


class Loop:
    """A training loop with everything that loops have: it learns from random numbers of five generators."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)
        self.agent = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        self.optimiser = torch.optim.AdamW(self.agent.parameters(), lr=1e-2, amsgrad=True)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimiser, 0.9)
        self.rng, self.old_rng, self.noise = np.random.default_rng(2), np.random.RandomState(2), torch.Generator()
        self.own = random.Random(2)
        self.objects = {
            "agent": self.agent, "optimiser": self.optimiser, "schedule": self.schedule, "rng": self.rng,
            "old_rng": self.old_rng, "noise": self.noise, "own": self.own,
        }  # fmt: skip

    def update(self) -> None:
        scale = random.random() + self.own.random() + np.random.rand() + self.old_rng.rand()  # noqa: NPY002
        x = torch.from_numpy(self.rng.normal(size=(8, 3)).astype(np.float32)) * scale
        loss = (self.agent(x) * torch.randn(8, 2) * torch.randn(1, generator=self.noise)).sum()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.schedule.step()

    def run(self, path: Path, num_updates: int) -> None:
        with tipl.Recorder(path, resume=True) as recorder:
            saved = recorder.restore(self.objects)
            for i in range(0 if saved is None else saved["update"] + 1, num_updates):
                self.update()
                recorder.log(self.agent, env_steps=i, state=self.objects | {"update": i})


@pytest.mark.slow
def test_a_loop_of_ones_own_goes_on_to_the_bit(tmp_path: Path) -> None:
    Loop().run(tmp_path / "whole", 6)
    for stop in (2, 3, 6):
        Loop().run(tmp_path / "parts", stop)
    assert (tmp_path / "whole" / STATE).read_bytes() == (tmp_path / "parts" / STATE).read_bytes()
    assert Store.open(tmp_path / "whole").fingerprint() == Store.open(tmp_path / "parts").fingerprint()
    assert len(np.unique(Store.open(tmp_path / "parts").trial(0).weights(), axis=0)) == 6
    assert not tipl.verify(tmp_path / "parts").problems


def test_a_checkpoint_whose_append_failed_is_appended_by_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, append = nn.Linear(2, 1), Store.append

    def fail(store: Store, *columns: Any) -> None:
        if store.num_checkpoints == 2:
            raise OSError("no space")
        append(store, *columns)

    monkeypatch.setattr(Store, "append", fail)
    with pytest.raises(OSError, match="no space"), tipl.Recorder(tmp_path / "run") as recorder:
        for i in range(3):
            agent.weight.data += 1
            recorder.log(agent, env_steps=i, episodic_return=float(i), state={"agent": agent})
    monkeypatch.undo()
    assert not tipl.verify(tmp_path / "run").problems
    with tipl.Recorder(tmp_path / "run", resume=True) as recorder:
        assert recorder.num_checkpoints == 2
        saved = recorder.restore()
        assert saved is not None
        assert torch.equal(saved["agent"]["weight"], agent.weight)
        assert (recorder.num_checkpoints, recorder.env_steps) == (3, 2)
        assert recorder.holds(agent)
    assert Store.open(tmp_path / "run").trial(0).episodic_return.tolist() == [0.0, 1.0, 2.0]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    agent = nn.Linear(2, 1)
    with tipl.Recorder(tmp_path / "run") as recorder:
        assert recorder.restore({"agent": agent}) is None
        with pytest.raises(TypeError, match=r"log: state\['x'\] must be .* got object"):
            recorder.log(agent, env_steps=0, state={"x": object()})
        assert not recorder.path.exists()
        recorder.log(agent, env_steps=0, state={"agent": agent, "n": 1})
        for objects, kind, message in (
            ({"agent": nn.Linear(3, 1)}, ValueError, r"restore: agent: .*size mismatch for weight"),
            ({"agent": np.random.default_rng(0)}, ValueError, "restore: agent: state must be for a PCG64"),
            ({"agent": torch.optim.SGD(agent.parameters())}, ValueError, "restore: agent: "),
            ({"n": 1}, TypeError, "restore: n: it must have a load_state_dict or be a generator .*, got int"),
            ({"m": agent}, ValueError, r"restore: objects must be among \['agent', 'n'\], got \['m'\]"),
        ):
            with pytest.raises(kind, match=message):
                recorder.restore(objects)
        recorder.log(agent, env_steps=1)
        with pytest.raises(RuntimeError, match="is the state at checkpoint 1, but the store has 2: it was recorded on"):
            recorder.restore()
    assert "is the state at checkpoint 1" in tipl.verify(tmp_path / "run").problems[0]


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    with tipl.Recorder(tmp_path / "run") as recorder:
        recorder.log(nn.Linear(2, 1), env_steps=0, state={"a": np.arange(9)})
        arrays, record = load_arrays(recorder.path / STATE, "test")
        for spoilt, message in (
            ({"format": "x"}, "is no state that this tipl reads"),
            ({"version": 9}, "is no state that this tipl reads"),
            ({"num_checkpoints": 0}, "num_checkpoints: Input should be greater than or equal to 1, got 0"),
            ({"tree": None}, "is damaged"),
            ({"tree": {"entries": {"a": {"array": "9"}}, "random": 1}}, "is damaged: '9'"),
            ({"tree": {"entries": {"a": {"pickle": "9"}}, "random": 1}}, "is damaged: not enough values"),
            ({"tree": {"entries": {"a": {"tensor": "0", "dtype": "load"}}, "random": 1}}, "is damaged"),
            ({"store": "other"}, "is of another store, 'other'"),
            ({"before": "other", "num_checkpoints": 2}, "is of another run: the store's checkpoints are not those"),
            ({"env_steps": 1}, "is of another run"),
        ):
            save_arrays(recorder.path / STATE, arrays, record | spoilt)
            with pytest.raises(RuntimeError, match=rf"state\.safetensors:? {message}"):
                recorder.restore()
