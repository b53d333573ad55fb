"""The recorder: what it appends, where it goes on, and what it refuses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from foreign_checkpoints import CleanRL
from torch import nn

import tipl
import tipl.storing.exporter
from tipl.collecting.policy_network import mean_action
from tipl.collecting.settings import is_complete, num_checkpoints_asked
from tipl.files.sealed import save_arrays
from tipl.policy import ParameterLayout, PolicySpec
from tipl.storing.store import Store


def step(model: nn.Module) -> None:
    """Move every parameter, as an optimiser would."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_a_training_loop_is_recorded(tmp_path: Path) -> None:
    agent, rows = CleanRL(), []
    with tipl.Recorder(tmp_path / "run.zarr", env_id="Hopper-v5", config={"lr": 3e-4}) as recorder:
        for update in range(5):
            recorder.log(agent, env_steps=2048 * update, episodic_return=10.0 * update if update else None)
            rows.append(torch.cat([agent.actor_logstd[0], *map(torch.flatten, agent.actor_mean.parameters())]).detach())
            step(agent)
            assert Store.open(recorder.path).num_checkpoints == recorder.num_checkpoints == update + 1
    store = Store.open(tmp_path / "run.zarr")
    trial = store.trial(0)
    assert store.policy == PolicySpec(4, 2, (8, 8))  # without the critic
    assert (store.env_id, store.config["lr"], store.config["source"]["format"]) == ("Hopper-v5", 3e-4, "recorder")
    np.testing.assert_array_equal(trial.weights(), torch.stack(rows).numpy())
    assert trial.env_steps.tolist() == [0, 2048, 4096, 6144, 8192]
    np.testing.assert_array_equal(trial.episodic_return, [np.nan, 10, 20, 30, 40])


def test_a_module_and_its_state_dict_are_the_same_and_a_gpu_or_half_precision_would_do(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).bfloat16()
    with tipl.Recorder(tmp_path / "run") as recorder:
        recorder.log(model, env_steps=0)
        recorder.log(model.state_dict(), env_steps=1)
        store = Store.open(recorder.path)
    assert isinstance(store.policy, ParameterLayout)
    assert list(store.policy.shapes) == [
        "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var",
    ]  # fmt: skip
    rows = store.trial(0).weights()
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[0, :12], model[0].weight.detach().float().numpy().ravel())
    assert store.env_id == "unknown"


def test_a_recordings_own_config_is_no_collections(tmp_path: Path) -> None:
    for i, config in enumerate(({"total_timesteps": 9, "ppo": 3}, {"total_timesteps": "9", "ppo": {"num_steps": 2}})):
        with tipl.Recorder(tmp_path / str(i), env_id="Hopper-v5", config=config) as recorder:
            recorder.log(CleanRL(), env_steps=1)
        store = Store.open(tmp_path / str(i))
        assert num_checkpoints_asked(store) is None
        assert is_complete(store)


def test_resume_appends_to_what_is_there(tmp_path: Path) -> None:
    agent, path = CleanRL(), tmp_path / "run"
    for start in (0, 3):
        with tipl.Recorder(path, resume=True, env_id="Hopper-v5") as recorder:
            assert (recorder.num_checkpoints, recorder.env_steps) == (start, start - 1)
            for t in range(start, start + 3):
                recorder.log(agent, env_steps=t)
                step(agent)
    trial = Store.open(path).trial(0)
    assert trial.env_steps.tolist() == list(range(6))
    assert len(np.unique(trial.weights(), axis=0)) == 6


def test_what_was_recorded_is_never_overwritten(tmp_path: Path) -> None:
    agent, path = CleanRL(), tmp_path / "run"
    with tipl.Recorder(path, env_id="Hopper-v5") as recorder:
        recorder.log(agent, env_steps=100)
        with pytest.raises(RuntimeError, match="another writer has it open"):
            tipl.Recorder(path, env_id="Hopper-v5", resume=True)
    with pytest.raises(ValueError, match="is not open for appending"):
        recorder.log(agent, env_steps=101)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(FileExistsError, match="pass resume=True to append"):
        tipl.Recorder(path)
    with pytest.raises(ValueError, match="must be a recording of Ant-v5 to append to, got Store"):
        tipl.Recorder(path, env_id="Ant-v5", resume=True)
    with tipl.Recorder(path, env_id="Hopper-v5", resume=True) as recorder:
        with pytest.raises(ValueError, match="env_steps must grow: 100 are recorded, got 100"):
            recorder.log(agent, env_steps=100)
        with pytest.raises(ValueError, match=r"does not fit .*run: log_std \(2,\) is missing; "):
            recorder.log(agent.actor_mean, env_steps=101)
    with (
        tipl.Recorder(path, env_id="Hopper-v5", activation="relu", resume=True) as recorder,
        pytest.raises(ValueError, match="the activation is relu instead of tanh"),
    ):
        recorder.log(agent, env_steps=101)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    tipl.Store.create(tmp_path / "collected", env_id="Hopper-v5", policy=PolicySpec(4, 2), seeds=[0], config={}).close()
    with pytest.raises(ValueError, match="must be a recording of Hopper-v5"):
        tipl.Recorder(tmp_path / "collected", env_id="Hopper-v5", resume=True)


def test_bad_policies_are_refused_and_nothing_is_appended(tmp_path: Path) -> None:
    agent = CleanRL()
    with tipl.Recorder(tmp_path / "run") as recorder:
        for spoilt, message in (
            ({}, "log: policy: no floating-point tensor of an actor is there"),
            ({"w": torch.tensor([1.0, np.nan])}, "log: policy: w must be finite, got NaN or Inf"),
        ):
            with pytest.raises(ValueError, match=message):
                tipl.Recorder(tmp_path / "other").log(spoilt, env_steps=0)
        recorder.log(agent, env_steps=0)
        state = agent.state_dict()
        del state["actor_mean.4.bias"]
        with pytest.raises(
            ValueError, match=r"policy: actor_mean\.4\.bias \(action_net\.bias of the policy\) is missing"
        ):
            recorder.log(state, env_steps=1)
        state["actor_mean.4.bias"] = torch.zeros(3)
        with pytest.raises(ValueError, match=r"policy: actor_mean\.4\.bias must have shape \(2,\), got \(3,\)"):
            recorder.log(state, env_steps=1)
        agent.actor_mean[2].bias.data[1] = torch.inf
        with pytest.raises(ValueError, match=r"policy: actor_mean\.2\.bias must be finite"):
            recorder.log(agent, env_steps=1)
    assert Store.open(tmp_path / "run").num_checkpoints == 1
    assert not (tmp_path / "other").exists()


def test_a_recording_of_a_part_is_written_back_into_the_whole(tmp_path: Path) -> None:
    agent = nn.ModuleDict({"encoder": nn.Linear(3, 2), "pi": nn.Linear(2, 1)})
    part = {key: value for key, value in agent.state_dict().items() if key.startswith("pi.")}
    with tipl.Recorder(tmp_path / "run") as recorder:
        recorder.log(part, env_steps=0)
    torch.save(agent.state_dict(), tmp_path / "agent.pt")
    forecast = {"weights": np.array([[1, 2, 3], [4, 5, 6]], np.float32), "checkpoint": np.array([7, 8])}
    save_arrays(tmp_path / "f.safetensors", forecast, tipl.storing.exporter.layout_record(Store.open(tmp_path / "run")))
    for checkpoint, expected in ((7, [1, 2, 3]), (8, [4, 5, 6]), (None, [4, 5, 6])):
        out = tmp_path / f"out{checkpoint}.pt"
        tipl.export_checkpoint(tmp_path / "f.safetensors", tmp_path / "agent.pt", out, checkpoint=checkpoint)
        written = torch.load(out, weights_only=True)
        assert [*written["pi.weight"].flatten().tolist(), *written["pi.bias"].tolist()] == expected
        assert torch.equal(written["encoder.weight"], agent["encoder"].weight)
    with pytest.raises(ValueError, match=r"checkpoint must lie in \[7, 8\], got 6"):
        tipl.export_checkpoint(tmp_path / "f.safetensors", tmp_path / "agent.pt", tmp_path / "x", checkpoint=6)


def test_the_activation_is_that_of_the_modules_or_asked_for(tmp_path: Path) -> None:
    def agent(*activations: nn.Module) -> nn.Module:
        first, second = activations
        actor = nn.Sequential(nn.Linear(3, 4), first, nn.Linear(4, 4), second, nn.Linear(4, 2))
        module = nn.Module()
        module.actor_mean, module.actor_logstd = actor, nn.Parameter(torch.zeros(1, 2))  # CleanRL's names
        return module

    with tipl.Recorder(tmp_path / "relu") as recorder:
        recorder.log(agent(nn.ReLU(), nn.ReLU()), env_steps=0)
    assert Store.open(tmp_path / "relu").policy == PolicySpec(3, 2, (4, 4), "relu")
    state = dict(agent(nn.ReLU(), nn.ReLU()).state_dict())
    with (
        tipl.Recorder(tmp_path / "none") as recorder,
        pytest.raises(ValueError, match=r"^log: policy: activation must be given, one of .*default is tanh$"),
    ):
        recorder.log(state, env_steps=0)
    assert not (tmp_path / "none").exists()
    with tipl.Recorder(tmp_path / "elu", activation="elu") as recorder:
        recorder.log(state, env_steps=0)
    assert Store.open(tmp_path / "elu").policy == PolicySpec(3, 2, (4, 4), "elu")
    with (
        tipl.Recorder(tmp_path / "none", activation="elu") as recorder,
        pytest.raises(ValueError, match=r"^log: policy: activation says elu, but relu lies between its layers: leave"),
    ):
        recorder.log(agent(nn.ReLU(), nn.ReLU()), env_steps=0)


class Gaussian(nn.Module):
    """A policy with CleanRL's names, whose mean is that of any modules."""

    def __init__(self, *actor: nn.Module, critic: nn.Module | None = None) -> None:
        super().__init__()
        self.actor_mean, self.actor_logstd = nn.Sequential(*actor), nn.Parameter(torch.zeros(1, 2))
        if critic is not None:
            self.critic = nn.Sequential(nn.Linear(3, 4), critic, nn.Linear(4, 1))


class Swish(nn.Module):
    """A user's own SiLU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


class Tanh(nn.Module):
    """A user's own module that is named like torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def actor_of(*between: nn.Module, behind: Any = ()) -> list[nn.Module]:
    first, second = between
    return [nn.Linear(3, 4), first, nn.Linear(4, 4), second, nn.Linear(4, 2), *behind]


MISREAD = {
    "leaky, then tanh": (actor_of(nn.LeakyReLU(), nn.Tanh()), "LeakyReLU"),
    "tanh behind": (
        actor_of(nn.Tanh(), nn.Tanh(), behind=[nn.Tanh()]),
        r"Tanh\(\) lies behind the last layer",
    ),
    "elu of another kind": (actor_of(nn.ELU(0.3), nn.ELU(0.3)), r"ELU\(alpha=0\.3\) lies between two of its layers"),
    "dropout": (actor_of(nn.Sequential(nn.Tanh(), nn.Dropout()), nn.Tanh()), r"Dropout\(p=0\.5"),
    "no activation": (actor_of(nn.Tanh(), nn.Identity()), "nothing lies between two of its layers"),
    "two in a row": (actor_of(nn.Sequential(nn.Tanh(), nn.Tanh()), nn.Tanh()), r"Tanh\(\) lies between two"),
    "two kinds": (actor_of(nn.ReLU(), nn.Tanh()), "relu and tanh lie between its layers"),
    "a user's own behind": (actor_of(nn.Tanh(), nn.Tanh(), behind=[Tanh()]), r"Tanh\(\) lies behind the last layer"),
}


@pytest.mark.parametrize("kind", MISREAD)
def test_an_actor_whose_modules_do_something_else_is_refused_or_kept_without_being_run(
    kind: str, tmp_path: Path
) -> None:
    actor, found = MISREAD[kind]
    policy = Gaussian(*actor, critic=nn.Tanh())
    for said in (None, "tanh"):
        with (
            tipl.Recorder(tmp_path / "refused", activation=said) as recorder,
            pytest.raises(ValueError, match=rf"^log: policy: .*{found}.*: .*; pass activation=\"other\" to") as refused,
        ):
            recorder.log(policy, env_steps=0)
        assert "\n" not in str(refused.value)
    with tipl.Recorder(tmp_path / "kept", activation="other") as recorder:
        recorder.log(policy, env_steps=0)
    assert isinstance(Store.open(tmp_path / "kept").policy, ParameterLayout)
    with tipl.Recorder(tmp_path / "said", activation="tanh") as recorder:
        recorder.log(policy.state_dict(), env_steps=0)
    assert Store.open(tmp_path / "said").policy == PolicySpec(3, 2, (4, 4))


def test_a_recording_that_was_run_so_far_does_not_go_on_in_silence(tmp_path: Path) -> None:
    policy = Gaussian(*actor_of(nn.Tanh(), nn.Tanh()))
    with tipl.Recorder(tmp_path / "run") as recorder:
        recorder.log(policy, env_steps=0)
    with (
        tipl.Recorder(tmp_path / "run", activation="other", resume=True) as recorder,
        pytest.raises(ValueError, match=r"does not fit .*run: it was recorded as one that the simulator runs, which"),
    ):
        recorder.log(policy, env_steps=1)
    for why, said in (
        (True, "its policies saw normalised observations"),
        ("frames were stacked", "frames were stacked"),
    ):
        with pytest.warns(UserWarning, match=f"does not say that the simulator must not run its policies: {said}"):
            tipl.Recorder(tmp_path / "run", unnormalised=why, resume=True).close()
    with tipl.Recorder(tmp_path / "marked", unnormalised="frames were stacked", env_id="Hopper-v5") as recorder:
        recorder.log(policy, env_steps=0)
    tipl.Recorder(tmp_path / "marked", unnormalised="frames were stacked", env_id="Hopper-v5", resume=True).close()
    with pytest.raises(ValueError, match=r"^score: the policies in .*marked cannot be run: frames were stacked$"):
        tipl.score(Store.open(tmp_path / "marked"), progress=False)


def test_only_the_caller_knows_what_modules_of_their_own_do(tmp_path: Path) -> None:
    policy = Gaussian(*actor_of(Swish(), Swish()))
    with (
        tipl.Recorder(tmp_path / "none") as recorder,
        pytest.raises(ValueError, match=r"Swish\(\) lies between two of its layers: pass activation, one of tanh, "),
    ):
        recorder.log(policy, env_steps=0)
    for start, said in ((0, "silu"), (1, None)):  # the recording says it when it goes on
        with tipl.Recorder(tmp_path / "silu", activation=said, resume=True) as recorder:
            recorder.log(policy, env_steps=start)
    assert Store.open(tmp_path / "silu").policy == PolicySpec(3, 2, (4, 4), "silu")


class Functional(nn.Module):
    """A policy with skrl's names, whose code joins its layers."""

    def __init__(self, *others: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(3, 4)])
        self.policy_layer, self.log_std_parameter = nn.Linear(4, 2), nn.Parameter(torch.zeros(2))
        self.value_layer = nn.Sequential(critic)
        for i, other in enumerate(others):
            setattr(self, f"other{i}", other)


@pytest.mark.parametrize(
    ("others", "activation"),
    [
        ((nn.ELU(),), "elu"),
        ((nn.ELU(), nn.ELU()), "elu"),
        ((), None),
        ((nn.ELU(), nn.Tanh()), None),
        ((nn.GELU(),), None),
    ],
)
def test_where_code_joins_the_layers_the_one_activation_beside_them_is_meant(
    others: Any, activation: str | None, tmp_path: Path
) -> None:
    policy = Functional(*others, critic=nn.Tanh())
    with tipl.Recorder(tmp_path / "run") as recorder:
        if activation is None:
            with pytest.raises(ValueError, match=r"^log: policy: .*activation(,| must be given,) one of tanh"):
                recorder.log(policy, env_steps=0)
        else:
            recorder.log(policy, env_steps=0)
            assert Store.open(tmp_path / "run").policy == PolicySpec(3, 2, (4,), activation)
    with tipl.Recorder(tmp_path / "relu", activation="relu") as recorder:
        if activation is None:
            recorder.log(policy, env_steps=0)


def test_what_is_recorded_of_any_modules_acts_as_they_do(tmp_path: Path) -> None:
    """Of generated actors each is refused, or its recording gives the actions of the module itself."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    kinds = [
        nn.Tanh, nn.ReLU, nn.ELU, nn.SiLU, nn.LeakyReLU, nn.GELU, nn.Mish, nn.Softplus, nn.Identity, nn.Hardtanh, Swish,
        Tanh, lambda: nn.ELU(0.5), lambda: nn.Sequential(nn.Tanh(), nn.Identity()), lambda: nn.Sequential(nn.ReLU6()),
    ]  # fmt: skip
    obs, taken = torch.randn(1, 9, 3), 0
    for i in range(150):
        usual = kinds[random.integers(4)]
        rare = [kinds[random.integers(len(kinds))] if random.random() < 0.15 else usual for _ in range(2)]
        behind = [kinds[random.integers(len(kinds))]()] if random.random() < 0.2 else []
        between = [rare[0]()] * 2 if rare[0] is rare[1] else [it() for it in rare]  # one module may act twice
        policy = Gaussian(*actor_of(*between, behind=behind), critic=kinds[random.integers(len(kinds))]())
        with tipl.Recorder(tmp_path / str(i)) as recorder:
            try:
                recorder.log(policy, env_steps=0)
            except ValueError:
                continue
        store = Store.open(tmp_path / str(i))
        row = torch.from_numpy(store.trial(0).weights().copy())
        torch.testing.assert_close(mean_action(store.policy, row, obs)[0], policy.actor_mean(obs)[0].detach())
        taken += 1
    assert taken > 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": 5}, "policy must be a torch.nn.Module or a state_dict, got int"),
        ({"policy": [1]}, "policy must be a torch.nn.Module or a state_dict, got list"),
        ({"normaliser": np.ones(3)}, "normaliser must have obs_rms, or mean and var, got ndarray"),
        ({"normaliser": torch.ones(3)}, "normaliser must have obs_rms, or mean and var, got Tensor"),
        ({"normaliser": (np.zeros(3), np.ones(3))}, "normaliser must have obs_rms, or mean and var, got tuple"),
        ({"normaliser": object()}, "normaliser must have obs_rms, or mean and var, got object"),
        ({"normaliser": SimpleNamespace(mean="a", var=[1.0])}, "normaliser must have mean and var that are arrays"),
        (
            {"normaliser": SimpleNamespace(mean=np.ones(2), var=np.ones(3))},
            "normaliser: mean and variance must be of one",
        ),
        ({"normaliser": SimpleNamespace(mean=np.ones(2), var=np.ones(2))}, "must exist with 3 numbers"),
        ({"episodic_return": "x"}, "episodic_return must be a number or None, got 'x'"),
        ({"env_steps": "x"}, "env_steps must be an int, got 'x'"),
    ],
)
def test_arguments_of_a_wrong_kind_are_named(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"policy": Gaussian(*actor_of(nn.Tanh(), nn.Tanh())), "env_steps": 0}
    with (
        tipl.Recorder(tmp_path / "run") as recorder,
        pytest.raises((ValueError, TypeError), match=rf"^log: .*{message}"),
    ):
        recorder.log(**(good | arguments))
    assert not (tmp_path / "run").exists()
