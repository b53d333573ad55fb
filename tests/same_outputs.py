"""Do two versions of tipl write the same? Runs small commands with both and compares their files byte by byte.

    python tests/same_outputs.py ../before/.venv/bin/python .venv/bin/python

Each argument is a Python in which one version is installed. Both collect three tasks, run every stage, reproduce the
paper on one small task, forecast, and save a sketch. What may differ is left out: times, versions, the machine,
manifests (which hash those), event files and pages. Prints what differs; the exit status is 0 where nothing does.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VARY = {"seconds", "machine", "tipl_version", "versions"}
"""Keys of JSON that may differ."""
SKIPPED = {"manifest.json", "seconds.json"}
SKIPPED_KINDS = {".html", ".png", ".svg"}

PROGRAM = """
import importlib, sys
import numpy as np
import tipl

def module(*names):  # a module's name before and after tipl had rooms
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(names)

ppo = tipl.PPOConfig(num_steps=64, num_minibatches=2, update_epochs=2)
small = {"n_components": 4, "n_layer": 1, "n_head": 2, "d_model": 16, "steps": 20, "refine_steps": 20}
learn = tipl.TrainConfig(**small, confidence_trials=2)
judge = tipl.EvaluateConfig(num_episodes=1)
for env_id in ("InvertedPendulum-v5", "Hopper-v5", "HalfCheetah-v5"):
    tipl.collect(f"{env_id}.zarr", env_id=env_id, num_trials=5, total_timesteps=20 * 64, ppo=ppo, progress=False)
store = tipl.Store.open("Hopper-v5.zarr")
tipl.train(store, "shared", tipl.TrainConfig(**{**vars(learn), "basis": "shared"}), progress=False)
model = tipl.train(store, "model", learn, progress=False)
tipl.evaluate(store, tipl.Forecaster.load(model), "evaluation", judge, progress=False)
np.save("forecast.npy", tipl.rollout(store.trial(0).weights(0, 9), 11, "model"))
np.save("pretrained.npy", tipl.rollout(store.trial(0).weights(0, 9), 11, layout=store.policy))
rows = np.random.default_rng(0).standard_normal((500, 300), dtype=np.float32).cumsum(0)
tipl.StreamingSVD(n_components=8, seed=1).fit(rows).save("sketch.safetensors")
np.save("gram.npy", tipl.gram(rows))
reproduction = module("tipl.reproduction", "tipl.reproduce")
Task = getattr(reproduction, "TaskSettings", None) or reproduction.Task
sizes = {"num_trials": 5, "total_timesteps": 20 * 64, "shared_components": 6}
reproduction.TASKS = {"InvertedPendulum-v4": Task(**sizes, ppo=ppo, train=learn, evaluate=judge)}
tipl.reproduce("reproduction", progress=False)
sys.argv = "tipl run --output run --num-trials 5 --total-timesteps 1280 --ppo.num-steps 64".split()
sys.argv += "--ppo.num-minibatches 2 --train.steps 10 --train.refine-steps 10 --evaluate.num-episodes 1".split()
module("tipl.cli").main()
"""


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("before", "after")]
        for python, folder in zip(sys.argv[1:], folders, strict=True):
            folder.mkdir()
            command = [str(Path(python).absolute()), "-c", PROGRAM]
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        before, after = (contents(folder) for folder in folders)
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            print(f"only {'before' if name in before else 'after'}: {name}")
        elif before[name] != after[name]:
            print(f"differs: {name}")
    same = sum(before.get(name) == content for name, content in after.items())
    print(f"{same} of {len(before.keys() | after.keys())} files are the same")
    return 0 if before == after else 1


def contents(folder: Path) -> dict[str, Any]:
    """Return what is compared: relative path -> bytes, or parsed JSON without what may differ."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name in SKIPPED or path.suffix in SKIPPED_KINDS or "tfevents" in path.name:
            continue
        data = path.read_bytes()
        is_json = path.suffix == ".json" and ".zarr" not in str(path)
        found[str(path.relative_to(folder))] = without_what_varies(json.loads(data)) if is_json else data
    return found


def without_what_varies(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_what_varies(inner) for key, inner in value.items() if key not in VARY}
    return [without_what_varies(inner) for inner in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
