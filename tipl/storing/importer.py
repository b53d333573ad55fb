"""Import: checkpoint files from the user's own runs with other libraries become a store.

One folder of checkpoint files is one trial. The store's config records under "source" the kind of the files and which
tensor each part of a row came from.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tipl.files.publishing import published, refuse_existing
from tipl.policy import Layout, Outputs
from tipl.storing.foreign_actors import roles_of
from tipl.storing.foreign_files import read_checkpoint_file
from tipl.storing.imported_runs import (
    FileRun,
    Reading,
    Rows,
    Run,
    check_equal,
    common_length,
    first_file,
    runs_of,
    seeds_of,
)
from tipl.storing.store import UNKNOWN, UNNORMALISED, Store
from tipl.storing.tensor_checks import shown

BLOCK_BYTES = 2**26  # of weights that are read and then appended together


# Over 60 lines because its docstring, the reference of all arguments and errors, takes half of them.
def import_checkpoints(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    env_id: str = UNKNOWN,
    env_kwargs: Mapping[str, Any] | None = None,
    pattern: str = "*",
    activation: str | None = None,
    actor: str | Sequence[str] | None = None,
    discrete: Outputs | None = None,
    squash: bool | None = None,
    halves: bool = False,
    ignore: str | Sequence[str] = (),
    order: str = "step",
    normaliser: str | Path | None = None,
    num_checkpoints: int | None = None,
    max_bytes: int | None = None,
) -> Store:
    """Return a new store at `output` with the checkpoints of other libraries' runs, one trial per folder.

    Reads the .zip of Stable-Baselines3 and sb3-contrib (PPO, A2C, SAC, TD3, ...), CleanRL's .cleanrl_model, rsl_rl's
    model_*.pt, parameters of Flax, Brax and MuJoCo Playground, state_dicts in .safetensors, .pt and .pth, and
    TorchScript; without running a pickle or other code. `foreign_actors` describes which tensors are the actor's.

    The files of a folder are ordered by the step in their names, the one number in which the names differ. Where that
    is not clear they are ordered by the steps that they state (SB3's num_timesteps, rsl_rl's iteration), or, if they
    state none and their names hold no numbers, by their names. `env_steps` are what the files state if that grows,
    otherwise the steps in the names, otherwise the index. The files hold no returns, so `episodic_return` is NaN.

    The statistics of VecNormalize are folded into the first layer where they lie beside the checkpoints
    (`observation_statistics`); without them `evaluate` refuses the policies of such a run. The config's source["note"]
    says what a user must know, such as statistics that no file holds.

    Args:
        sources: folders, one for each trial; or files, which together are one trial; or stores (from `Recorder`,
            `tipl import`, ...), from which all trials are taken.
        env_id: the Gymnasium id, which the files do not hold; `tipl evaluate` needs it. By default that of the stores.
        env_kwargs: arguments with which the runs' environment was made, beside the id, as plain JSON; all that runs
            the policies later uses them. By default those of the stores.
        pattern: glob pattern of the file names to take in each folder, such as "rl_model_*_steps.zip".
        activation: between the layers, where the files do not say it: tanh, relu, elu or silu (which JAX also calls
            swish). It must be given there if the simulator can run the policy.
        actor: prefix of the actor's keys, or several, where files hold other networks too; "" takes all but critics.
        discrete: what the outputs of an MLP that chooses discrete actions are, one for each action, where the files do
            not say it: "logits", whose softmax is the probability of each, or "values", as in DQN. The MLP may have any
            names, as a torch.nn.Sequential numbers its layers.
        squash: whether the actions of TorchRL's policies are the tanh of the network's output, rescaled to the action
            space (TanhNormal), or the output itself; must be given for them, as nothing says it.
        halves: whether the last layer has two outputs for each action, first all means and then what becomes standard
            deviations, where no key says it: TorchRL's NormalParamExtractor, and rsl_rl's
            HeteroscedasticGaussianDistribution. Brax's files need not say it.
        ignore: glob pattern of keys, or several, that are no weights of the policy, such as "obs_rms.*".
        order: what orders the files of a trial: "step", the steps in their names, or if these are not clear what the
            files state; "stated", what the files state in any case; "name"; "mtime", the time of modification; or a
            regular expression searched in each name, whose group, or without one the whole match, is the step.
        normaliser: the file with VecNormalize's statistics of all checkpoints; "none" if the policies saw observations
            as they were. By default what lies beside the checkpoints, for runs that say that they used VecNormalize.
        num_checkpoints: take only the first so many of each trial; by default all, if all trials have equally many.
        max_bytes: limit on each file's size and a zip's unpacked size; by default 1 GiB, for a zip less
            (`torch_files.py`).

    Raises:
        FileExistsError: `output` exists; it is not changed.
        FileNotFoundError: a source does not exist or holds no checkpoint.
        ValueError: trials differ in layout or length, weights are not finite, or it is not clear which tensors are the
            actor's or which number is the step.
        RuntimeError: a file is damaged, changes while it is read, needs too much memory, or could be loaded only by
            running code from it.
        OSError: a file cannot be read.

    After any of these, except FileExistsError, there is nothing at `output`.
    """
    output = Path(output)
    refuse_existing(output, "import")
    reading = Reading(
        activation, actor, discrete, squash, halves, _patterns(ignore), order, normaliser, num_checkpoints, max_bytes
    )
    plan = _Plan.of(_paths(sources), env_id, env_kwargs, pattern, reading)
    return write_store(
        output,
        "import",
        [run.read for run in plan.runs],
        plan.length,
        env_id=plan.env_id,
        env_kwargs=plan.env_kwargs,
        policy=plan.policy,
        seeds=seeds_of(plan.runs, plan.length),
        config={"source": plan.source},
    )


def write_store(
    output: Path,
    command: str,
    readers: Sequence[Callable[[int, int], Rows]],
    num_checkpoints: int,
    *,
    policy: Layout,
    **settings: Any,
) -> Store:
    """Return a new store of whole trials at `output`, made by `command`, whole or not at all.

    Each trial's reader returns its checkpoints from one index to another. `settings` are further ones of
    `Store.create`.
    """
    block = max(1, BLOCK_BYTES // (4 * policy.num_params * len(readers)))
    with (
        published(output, command, manifest=False) as aside,
        Store.create(aside, policy=policy, **settings) as store,
    ):
        for start in range(0, num_checkpoints, block):
            parts = [read(start, min(start + block, num_checkpoints)) for read in readers]
            store.append(*(np.stack(column) for column in zip(*parts, strict=True)))
    return Store.open(output)


def describe_import(
    sources: Sequence[str | Path],
    *,
    env_id: str = UNKNOWN,
    env_kwargs: Mapping[str, Any] | None = None,
    pattern: str = "*",
    activation: str | None = None,
    actor: str | Sequence[str] | None = None,
    discrete: Outputs | None = None,
    squash: bool | None = None,
    halves: bool = False,
    ignore: str | Sequence[str] = (),
    order: str = "step",
    normaliser: str | Path | None = None,
    num_checkpoints: int | None = None,
    max_bytes: int | None = None,
) -> list[tuple[str, str]]:
    """Return what `import_checkpoints` would do with these arguments, as pairs of a label and a text; writes nothing.

    What each floating-point tensor of the first file is taken for, which files make a trial in which order and at which
    env steps, and the notes. Raises what `import_checkpoints` raises.
    """
    reading = Reading(
        activation, actor, discrete, squash, halves, _patterns(ignore), order, normaliser, num_checkpoints, max_bytes
    )
    plan = _Plan.of(_paths(sources), env_id, env_kwargs, pattern, reading)
    for run in plan.runs:
        for i in range(plan.length):
            run.read(i, i + 1)  # refuses what the import would
    first = plan.runs[0]
    lines = [("policy", f"{plan.policy}"), ("env_id", plan.env_id)]
    lines += [("env_kwargs", json.dumps(plan.env_kwargs))] if plan.env_kwargs else []
    if isinstance(first, FileRun):
        lines[:0] = [("file", shown(first.paths[0]))]
        lines += [("tensor", f"{key} {shape}: {role}") for key, shape, role in first.tensors()]
    for run in plan.runs:
        lines.append(("trial", f"{run.name}: {plan.length} checkpoints{run.described(plan.length)}"))
    return lines + ([("note", plan.source["note"])] if "note" in plan.source else [])


def describe_first_file(
    sources: Sequence[str | Path], *, pattern: str = "*", max_bytes: int | None = None
) -> list[tuple[str, str]]:
    """Return the first file that an import of these sources would read, and its tensors, of which none is chosen yet.

    That is what there is to choose from where `describe_import` refuses. Raises what it raises where no file can be
    read.
    """
    path = first_file(_paths(sources), pattern)
    if path is None:
        return []
    roles = roles_of(read_checkpoint_file(path, max_bytes=max_bytes).state, None)
    return [("file", shown(path)), *(("tensor", f"{shown(key)} {shape}: {role}") for key, shape, role in roles)]


def _paths(sources: Sequence[str | Path]) -> list[Path]:
    if isinstance(sources, str | Path):
        raise TypeError(f"import: sources must be a list of paths, got {str(sources)!r}")
    return [Path(source) for source in sources]


def _patterns(ignore: str | Sequence[str]) -> tuple[str, ...]:
    return (ignore,) if isinstance(ignore, str) else tuple(ignore)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What an import makes of its sources."""

    runs: "list[Run]"
    env_id: str
    env_kwargs: Mapping[str, Any]
    length: int
    """Checkpoints of each trial."""
    source: dict[str, Any]
    """The entry "source" of the store's config."""

    @property
    def policy(self) -> Layout:
        return self.runs[0].policy

    @classmethod
    def of(
        cls, sources: list[Path], env_id: str, env_kwargs: Mapping[str, Any] | None, pattern: str, reading: "Reading"
    ) -> "_Plan":
        """Return the plan. Raises what `import_checkpoints` says."""
        for name, value in (("num_checkpoints", reading.num_checkpoints), ("max_bytes", reading.max_bytes)):
            if value is not None and not isinstance(value, int):
                raise TypeError(f"import: {name} must be an int, got {value!r}")
            if value is not None and value < 1:
                raise ValueError(f"import: {name} must be at least 1, got {value}")
        for name, text in (("env_id", env_id), ("pattern", pattern), ("order", reading.order)):
            if not isinstance(text, str):
                raise TypeError(f"import: {name} must be a str, got {text!r}")
        runs = runs_of(sources, pattern, reading)
        env_ids = {run.env_id for run in runs} - {UNKNOWN} if env_id == UNKNOWN else {env_id}
        if len(env_ids) > 1:
            raise ValueError(
                f"import: the stores are of several env_ids, {sorted(env_ids)}; pass one if they are the same"
            )
        kwargs = [run.env_kwargs for run in runs] if env_kwargs is None else [env_kwargs]
        if others := [it for it in kwargs if it != kwargs[0]]:
            raise ValueError(
                f"import: the stores are of several env_kwargs, {kwargs[0]!r:.80} and {others[0]!r:.80}; pass those of "
                "all"
            )
        for run in runs[1:]:
            check_equal(runs[0], run)
        length = common_length(runs, reading.num_checkpoints)
        source = {**runs[0].source, "trials": [run.name for run in runs]}
        notes = dict.fromkeys(run.source["note"] for run in runs if "note" in run.source)
        if unrunnable := [why for run in runs if (why := run.source.get(UNNORMALISED))]:
            source[UNNORMALISED] = unrunnable[0]  # True, or why in words
        source |= {"note": "; ".join(notes)} if notes else {}
        return cls(runs, "".join(env_ids) or UNKNOWN, kwargs[0], length, source)
