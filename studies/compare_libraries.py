"""Do policies of other libraries act in tipl as they do in their library? One row for each kind of checkpoint.

    python studies/compare_libraries.py --seconds 120 --output docs/figures/libraries.json
    python studies/compare_libraries.py --seconds 5 --output runs/libraries.json sb3-ppo brax

For each name (by default all), the library trains a policy for so many seconds of wall clock on one thread and saves
two checkpoints, halfway and at the end. `tipl.import_checkpoints` imports both, and the newest policy is compared with
the library's own: its actions on 200 observations, and the returns of five episodes with the same seeds, the library's
in Gymnasium's environment. `tipl.export_checkpoint` then writes the newest weights into the earlier checkpoint, which
the library loads and which is compared with the newest in the same way.

A row in OUTPUT is replaced when its name runs again; the others stay. A name whose library cannot be imported is
skipped, with the reason. The numbers in a row are greatest absolute differences:

* `actions`: before they are clipped to the action space; of discrete actions the logarithms of probabilities, or DQN's
  values. Observations that the library's normaliser clips, which no imported policy can, are left out.
* `with_noise`: how much the library's own returns change when its outputs get Gaussian noise as large as that
  difference. Chaotic dynamics make of it what they make of rounding.
* `clipped_states`: the share of states in the library's own episodes that its normaliser clips; `unclipped`: what the
  difference is when it clips none.

Install what is to be compared, each with the torch that tipl has: stable-baselines3, sb3-contrib, rsl-rl-lib, skrl,
rl-games, torchrl, brax, flax. With Brax, time starts after the first update, which compiles; so does the second.
"""

import contextlib
import io
import json
import sys
import tempfile
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from library_trainings import ROWS, Floats, Policy, Trained, action_bounds
from numpy.typing import NDArray
from study import command_line, write_record

import tipl
from tipl.collecting.episodes import episodic_returns, policy_to_run
from tipl.collecting.policy_network import actions_of, mean_action

NUM_OBSERVATIONS, NUM_EPISODES = 200, 5


def env_action(space: gymnasium.Space[Any], outputs: Floats) -> Any:
    """Return the action that a policy with these outputs (n,) takes in the environment."""
    if isinstance(space, Discrete):
        return space.start + outputs.argmax()
    assert isinstance(space, Box)
    return np.clip(outputs, space.low, space.high)


def observations(env_id: str, policy: Policy) -> Floats:
    """Return observations (200, obs_dim) of episodes in which half of the actions are random."""
    env, rng = gymnasium.make(env_id), np.random.default_rng(0)
    env.action_space.seed(0)
    seen: list[Floats] = []
    obs, _ = env.reset(seed=0)
    while len(seen) < 10 * NUM_OBSERVATIONS:
        seen.append(obs.astype(np.float32))
        own = env_action(env.action_space, policy(seen[-1][None])[0])
        obs, _, terminated, truncated, _ = env.step(own if rng.random() < 0.5 else env.action_space.sample())
        if terminated or truncated:
            obs, _ = env.reset()
    return np.stack(seen)[rng.choice(len(seen), NUM_OBSERVATIONS, replace=False)]


def own_returns(env_id: str, policy: Policy) -> tuple[NDArray[np.float64], float]:
    """Return the returns (5,) of a library's policy, and the share of states that its normaliser clips."""
    env, returns, seen = gymnasium.make(env_id), np.zeros(NUM_EPISODES), []
    for seed in range(NUM_EPISODES):
        (obs, _), over = env.reset(seed=seed), False
        while not over:
            seen.append(obs.astype(np.float32))
            action = env_action(env.action_space, policy(seen[-1][None])[0])
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[seed] += float(reward)
            over = terminated or truncated
    return returns, round(float(policy.clips(np.stack(seen)).mean()), 4)


def greatest(difference: NDArray[Any]) -> float:
    return float(f"{np.abs(difference).max():.2g}")


@torch.no_grad()
def compare(run: Trained, folder: Path) -> dict[str, Any]:
    """Return what a row says of a library's training, beside its name and version."""
    training = {
        "what": run.what,
        "task": run.env_id,
        "env_steps": run.env_steps,
        "seconds": round(run.clock.elapsed, 1),
    }
    earlier, newest = run.clock.checkpoints
    store = tipl.import_checkpoints([earlier, newest], folder / "store.zarr", env_id=run.env_id, **run.options)
    spec, weights = policy_to_run("compare_libraries", store), store.trial(0).weights()[-1:]
    written = tipl.export_checkpoint(str(store.path), earlier, folder / "exported" / earlier.name)
    policy, exported = run.load(newest), run.load(written)
    obs = observations(run.env_id, policy)
    obs = obs[~policy.clips(obs) & ~exported.clips(obs)]
    imported = mean_action(spec, torch.from_numpy(weights), torch.from_numpy(obs)[None])[0].numpy()
    own, again = policy(obs), exported(obs)
    actions: dict[str, Any] = {"compared": spec.outputs if spec.discrete else "actions"}
    if spec.outputs == "logits":  # of which some libraries give the logarithms of the probabilities
        own, again, imported = (torch.from_numpy(it).log_softmax(-1).numpy() for it in (own, again, imported))
    if spec.discrete:
        actions["other_choices"] = int((own.argmax(-1) != imported.argmax(-1)).sum())
    else:
        imported = actions_of(spec, imported, *action_bounds(run.env_id))
    difference = greatest(own - imported)
    actions |= {"difference": difference, "greatest": greatest(own), "observations": len(obs)}
    of_imported = episodic_returns(run.env_id, spec, weights, np.arange(NUM_EPISODES), num_threads=1)[0]
    of_library, clipped = own_returns(run.env_id, policy)
    of_noise, _ = own_returns(run.env_id, policy.with_noise(difference))
    returns = {"library": of_library.tolist(), "difference": greatest(of_library - of_imported)}
    returns |= {"with_noise": greatest(of_library - of_noise), "clipped_states": clipped}
    of_exported, clipped = own_returns(run.env_id, exported)
    exported_returns = {"difference": greatest(of_library - of_exported), "clipped_states": clipped}
    if policy.stop_clipping and exported.stop_clipping:
        policy.stop_clipping()
        exported.stop_clipping()
        of_library, of_exported = own_returns(run.env_id, policy)[0], own_returns(run.env_id, exported)[0]
        returns["unclipped"] = greatest(of_library - of_imported)
        exported_returns["unclipped"] = greatest(of_library - of_exported)
    return {
        "training": training,
        "actions": actions,
        "returns": returns,
        "exported_actions": greatest(own - again),
        "exported_returns": exported_returns,
        "notes": (store.config.get("source") or {}).get("note", ""),
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ROWS)}; by default all")
    parser.add_argument("--seconds", type=float, default=120.0, help="of wall clock that each training has")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file of all rows")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(ROWS)
    if unknown:
        parser.error(f"NAME: must be of {', '.join(ROWS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    rows, failed = {}, []
    if arguments.output.exists():
        rows = {row["name"]: row for row in json.loads(arguments.output.read_text())["rows"]}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or ROWS:
        package, train = ROWS[name]
        try:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                torch.manual_seed(0)
                found = compare(train(arguments.seconds, Path(folder)), Path(folder))
        except ImportError as error:
            print(f"{name}: skipped: {error}")
            continue
        except Exception:  # the other libraries' rows do not depend on it
            traceback.print_exc()
            failed.append(name)
            continue
        rows[name] = {"name": name, "library": package, "version": version(package), **found}
        write_record(arguments.output, {"rows": list(rows.values())}, indent=1)
        print(
            f"{name}: {found['training']['env_steps']:,} steps; actions differ by {found['actions']['difference']} of "
            f"{found['actions']['greatest']}, returns by {found['returns']['difference']}; exported "
            f"{found['exported_actions']}, {found['exported_returns']['difference']}",
            flush=True,
        )
    if failed:
        sys.exit(f"compare_libraries: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
