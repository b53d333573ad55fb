"""Cards: the README.md of a repository on the hub, written from the files that it describes.

The head is YAML, which the hub indexes: licence, tags, library. Below stand only facts that the files state.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tipl.collecting.description import describe_store
from tipl.collecting.settings import flat_config
from tipl.files.manifest import read_listed
from tipl.files.schema import parse, parse_json
from tipl.forecasting.forecaster import TrainedFolder
from tipl.forecasting.transformer import BareFolder
from tipl.policy import PolicySpec, layout_from_dict
from tipl.sharing.kinds import Kind
from tipl.sharing.origin import origin_of
from tipl.storing.store import Store
from tipl.storing.zoo import Zoo, load_zoo

CARD = "README.md"


def card_of(kind: Kind, folder: Path, repo_id: str, license: str | None) -> str:
    """Return the card of a folder of this kind, which is to be pushed to `repo_id`."""
    if kind.name == "store":
        return store_card(Store.open(folder), repo_id, license)
    if kind.name == "zoo":
        return zoo_card(load_zoo(folder), repo_id, license)
    return model_card(folder, repo_id, license)


def store_card(store: Store, repo_id: str, license: str | None) -> str:
    """Return the card of a store."""
    described, ppo = describe_store(store), store.config.get("ppo")
    rows = {
        "task": store.env,
        "runs": described["trials"],
        "checkpoints": f"{store.num_checkpoints} of each run",
        "env steps": described.get("env steps", "unknown").replace("per trial", "of each run"),
        "policy": described["policy"],
        "return at the end": _returns(store),
        "made by": origin_of(store) or "not stated",
    }
    tags = ["reinforcement-learning", *(["ppo"] if ppo else []), store.env_id]
    parts = [
        f"# {len(store)} {'PPO ' if ppo else ''}runs of {store.env_id}",
        "The weights of a policy at every checkpoint of each run, as a store of tipl (Zarr v3).",
        _table(("", ""), rows.items()),
    ]
    if isinstance(ppo, dict):
        parts += ["## PPO", _table(("setting", "value"), flat_config(ppo).items())]
    elif note := (store.config.get("source") or {}).get("note"):
        parts += ["## Note", str(note)]
    name = f"{repo_id.rpartition('/')[2]}.zarr"
    parts.append(
        _loading(
            f'store = tipl.Store.open(tipl.pull("{repo_id}", "{name}"))',
            "weights = store.trial(0).weights()  # (checkpoints, weights) float32",
        )
    )
    return _head("dataset", license, tags) + "\n\n".join(parts) + "\n"


def zoo_card(zoo: Zoo, repo_id: str, license: str | None) -> str:
    """Return the card of a zoo."""
    rows = [
        (task, entry.path, entry.num_trials, entry.num_checkpoints, entry.made_by or "not stated")
        for task, entries in zoo.tasks.items()
        for entry in entries
    ]
    parts = [
        f"# Runs of {', '.join(zoo.tasks)}",
        "The weights of a policy at every checkpoint of each run, as stores of tipl (Zarr v3); `zoo.json` lists them.",
        _table(("task", "store", "runs", "checkpoints", "made by"), rows),
        _loading(
            f'zoo = tipl.load_zoo("hf://datasets/{repo_id}")', f'store = zoo.store("{rows[0][1]}")' if rows else ""
        ),
    ]
    return _head("dataset", license or zoo.license, ["reinforcement-learning", *zoo.tasks]) + "\n\n".join(parts) + "\n"


def model_card(folder: Path, repo_id: str, license: str | None) -> str:
    """Return the card of a model folder."""
    path = folder / "config.json"
    config = parse_json(read_listed(path), path)
    trained = parse(TrainedFolder, config, path) if "train" in config else None
    parse(BareFolder, config, path, more=True)
    tags = ["reinforcement-learning", *dict.fromkeys(it.env_id for it in (trained.stores if trained else []))]
    parts = [
        "# A forecaster of policy weights",
        "A model of tipl (TIPL, arXiv 2503.04074): from the first checkpoints of a run it forecasts the later ones, "
        f"on paths of at most {config['model']['max_len']} checkpoints.",
    ]
    if trained:
        parts += ["## Trained on", _table(("task", "policy", "training runs", "validation runs"), _runs(trained))]
    if calibrated := config.get("calibrated_on"):
        on = ", ".join(f"{len(it['seeds'])} runs of {it['env_id']}" for it in calibrated)
        parts.append(f"Its confidence was calibrated on {on}.")
    parts += ["## Model", _table(("setting", "value"), flat_config(config["model"]).items())]
    if trained:
        parts += ["## Training", _table(("setting", "value"), flat_config(config["train"]).items())]
    name = repo_id.rpartition("/")[2]
    parts.append(
        _loading(
            f'forecaster = tipl.Forecaster.load(tipl.pull("{repo_id}", "{name}"))',
            "# observed: the first checkpoints of a run, (checkpoints, weights) float32; store: where they come from",
            "forecast = forecaster.forecast([observed], [15], layout=store.policy)[0]",
        )
    )
    return _head("model", license, tags) + "\n\n".join(parts) + "\n"


def _head(repo_type: str, license: str | None, tags: Sequence[str]) -> str:
    """Return the YAML head."""
    from huggingface_hub import DatasetCardData, ModelCardData

    kind = DatasetCardData if repo_type == "dataset" else ModelCardData
    data = kind(license=license, library_name="tipl", tags=["tipl", *tags])
    return f"---\n{data.to_yaml()}\n---\n\n"


def _loading(*lines: str) -> str:
    code = "\n".join(["import tipl", "", *filter(None, lines)])
    return f"## Load\n\n`pip install 'tipl[hub]'`, then\n\n```python\n{code}\n```"


def _returns(store: Store) -> str:
    """Return in words the last known returns of the runs, and how they spread."""
    paths = [store.trial(i).episodic_return for i in range(len(store))]
    last = [path[~np.isnan(path)][-1] for path in paths if not np.isnan(path).all()]
    if not last:
        return "not known"
    spread = f", standard deviation {np.std(last, ddof=1):,.1f}" if len(last) > 1 else ""
    return f"mean {np.mean(last):,.1f}{spread}, from {min(last):,.1f} to {max(last):,.1f} over {len(last)} runs"


def _runs(trained: TrainedFolder) -> Iterable[Sequence[object]]:
    """Return task, policy and numbers of runs of each store that taught the forecaster."""
    most = trained.train.max_trials
    for it in trained.stores:
        yield (
            it.env_id,
            _policy(it.policy),
            min(most, len(it.split.train)),
            min(max(1, most // 4), len(it.split.validation)),
        )


def _policy(described: Mapping[str, Any]) -> str:
    layout = layout_from_dict(dict(described))
    return f"{layout.num_params:,} weights" + (f", {layout}" if isinstance(layout, PolicySpec) else "")


def _table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of Markdown."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
