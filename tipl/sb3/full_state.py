"""All that an on-policy algorithm of Stable-Baselines3 needs so that learn() goes on to the bit, as a tree, and back.

The state is taken where a rollout starts, when SB3 has drawn gSDE's exploration matrices already, or where training
ends, when it has not. It is put back when learn() has prepared everything, so that the call that goes on is the call
that was cut off: `total_timesteps` is the env step at which the whole run ends.
"""

import operator
import warnings
from collections import deque
from pathlib import Path
from typing import Any

from tipl.files.versions import changed_versions, versions
from tipl.sb3 import env_state
from tipl.sb3.env_state import Lost
from tipl.storing.state_tree import is_tree
from tipl.storing.tensor_checks import shown

_COUNTS = (
    "num_timesteps", "_episode_num", "_n_updates", "_current_progress_remaining", "ep_info_buffer",
    "ep_success_buffer",
)  # fmt: skip
_NOT_SETTINGS = {"num_timesteps", "seed", "verbose", "start_time", "tensorboard_log", "learning_rate"}
_SCHEDULES = ("lr_schedule", "clip_range", "clip_range_vf")
_GSDE = ("exploration_mat", "exploration_matrices")
NOT_EQUAL = "the run goes on, but not to the bit as if it had not been cut off"


def training_state(model: Any, *, in_rollout: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the model's state as entries for `Recorder.log`, and in words what cannot be kept of its environments.

    `in_rollout` says whether a rollout has started, or training has ended.
    """
    envs, lost = env_state.envs_state(model.env)
    last = {name: value for name, value in vars(model).items() if name.startswith("_last_")}
    exploration = {}
    if in_rollout and model.use_sde:
        exploration = {name: getattr(model.policy.action_dist, name) for name in _GSDE}
    return {
        "made": _made(model),
        "settings": _settings(model),
        "versions": _versions(),
        "networks": {name: network.state_dict() for name, network in _networks(model).items()},
        "model": {name: getattr(model, name) for name in _COUNTS} | {"ep_info_buffer": _episodes(model)} | last,
        "total_timesteps": model._total_timesteps,
        "exploration": exploration,
        "envs": envs,
        "lost": lost,
        "in_rollout": in_rollout,
    }, lost


def _episodes(model: Any) -> deque[dict[str, Any]]:
    """Return the results of the last episodes, without what a Monitor's info_keywords add that is no plain value."""
    episodes = ({key: it for key, it in episode.items() if is_tree(it)} for episode in model.ep_info_buffer)
    return deque(episodes, maxlen=model.ep_info_buffer.maxlen)


def check(model: Any, saved: dict[str, Any], path: Path) -> None:
    """Raise ValueError where the model or its environments are not made as those at `path` were, and warn where their
    settings or the versions differ."""
    if "made" not in saved:
        raise ValueError(f"resume: the state in {shown(path)} must be of Stable-Baselines3, but holds {sorted(saved)}")
    made = _made(model)
    for what, was in saved["made"].items():
        if made[what] != was:
            expected, got = _first_difference(was, made[what])
            raise ValueError(
                f"resume: the model must be made as the one recorded in {shown(path)}, but the {what} differ: "
                f"expected {expected}, got {got}"
            )
    settings = _settings(model)
    for name in sorted(saved["settings"].keys() | settings.keys()):
        was, now = saved["settings"].get(name), settings.get(name)
        if was != now:
            warnings.warn(f"resume: {name} was {was} in {shown(path)} and is {now} now: {NOT_EQUAL}", stacklevel=4)
    for name, (then, now) in changed_versions(saved["versions"], _versions()).items():
        warnings.warn(
            f"resume: {shown(path)} was recorded with {name} {then} and goes on with {name} {now}: the rest may differ "
            "in its last bits from an uninterrupted run",
            stacklevel=4,
        )


def put_back(model: Any, saved: dict[str, Any], path: Path) -> None:
    """Put a state that `check` has passed back into the model and its environments.

    Warns of what cannot be put back; then all environments begin new episodes.
    """
    for name, network in _networks(model).items():
        network.load_state_dict(saved["networks"][name])
    for name, value in saved["model"].items():
        if name in _COUNTS or name.startswith("_last_"):
            setattr(model, name, value)
    model._num_timesteps_at_start = model.num_timesteps  # of which SB3 computes env steps per second
    lost = list(saved["lost"])
    try:
        env_state.set_wrappers_state(model.env, saved["envs"])
        if not lost:
            env_state.set_envs_state(model.env, saved["envs"])
    except Lost as error:
        lost = [str(error)]
    if lost:
        _begin_episodes(model)
        warnings.warn(
            f"resume: the state of the environments in {shown(path)} cannot be put back ({'; '.join(lost)}): they "
            f"begin new episodes, and {NOT_EQUAL}",
            stacklevel=4,
        )


def put_exploration_back(model: Any, saved: dict[str, Any]) -> None:
    """Put gSDE's exploration matrices back."""
    for name, matrix in saved["exploration"].items():
        setattr(model.policy.action_dist, name, matrix.to(model.device))


def check_target(model: Any, saved: dict[str, Any], path: Path) -> None:
    """Raise ValueError where learn() would do nothing though the run was to go on; warn where it changes a schedule."""
    steps, then, now = saved["model"]["num_timesteps"], saved["total_timesteps"], model._total_timesteps
    if now == then:
        return
    if now <= steps:
        raise ValueError(
            f"resume: learn() must end beyond env step {steps}, which {shown(path)} has reached, got {now}; "
            f"total_timesteps counts the whole run: {then} in the call that was cut off"
        )
    if any(len({schedule(progress) for progress in (1.0, 0.5, 0.0)}) > 1 for schedule in _schedules(model).values()):
        warnings.warn(
            f"resume: {shown(path)} was to end at env step {then}, and learn() now ends at {now}, so its schedules "
            f"(learning rate, clip range) go on from another value; total_timesteps={then}, without "
            "reset_num_timesteps=False, continues the run as it was",
            stacklevel=4,
        )


def _begin_episodes(model: Any) -> None:
    """Reset the environments, with other random numbers than those of the run's beginning."""
    if model.seed is not None:
        model.env.seed((model.seed + model.num_timesteps) % 2**31)
    model._last_obs = model.env.reset()
    model._last_episode_starts[:] = True
    if model.get_vec_normalize_env() is not None:
        model._last_original_obs = model.get_vec_normalize_env().get_original_obs()


def _networks(model: Any) -> dict[str, Any]:
    """Return the modules and optimisers that SB3 itself saves, by name."""
    return {name: operator.attrgetter(name)(model) for name in model._get_torch_save_params()[0]}


def _made(model: Any) -> dict[str, Any]:
    """Return what must be equal for a state to fit: classes, layers and their sizes, environments."""
    sizes = {key: list(tensor.shape) for key, tensor in model.policy.state_dict().items()}
    return {
        "algorithms": type(model).__name__,
        "numbers of environments": model.n_envs,
        "environments": env_state.described(model.env),
        "parameters": [f"{key} {tuple(shape)}" for key, shape in sizes.items()],
        "policies": repr(model.policy).splitlines(),
        "optimisers": type(model.policy.optimizer).__name__,
    }


def _settings(model: Any) -> dict[str, Any]:
    """Return the model's own settings: its plain attributes, and its schedules at three moments of the run."""
    plain = {
        name: value
        for name, value in vars(model).items()
        if type(value) in (type(None), bool, int, float, str) and name[0] != "_" and name not in _NOT_SETTINGS
    }
    return plain | {name: [float(it(p)) for p in (1.0, 0.5, 0.0)] for name, it in _schedules(model).items()}


def _schedules(model: Any) -> dict[str, Any]:
    found = {name: getattr(model, name, None) for name in _SCHEDULES}
    return {name: schedule for name, schedule in found.items() if callable(schedule)}


def _versions() -> dict[str, str]:
    return versions("tipl", "torch", "numpy", "mujoco", "gymnasium", "stable-baselines3")


def _first_difference(then: Any, now: Any) -> tuple[str, str]:
    """Return the first entries of two lists that differ, in words; of anything else the two themselves."""
    if not (isinstance(then, list) and isinstance(now, list)):
        return str(then), str(now)
    longest = max(len(then), len(now))
    pairs = zip(*(it + ["nothing"] * (longest - len(it)) for it in (then, now)), strict=True)
    return next((str(a).strip(), str(b).strip()) for a, b in pairs if a != b)
