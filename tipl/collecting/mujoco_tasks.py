"""Gymnasium's MuJoCo tasks as NumPy functions over many simulations at once: one table, `TASKS`, by environment id.

The reference is Gymnasium's source, gymnasium/envs/mujoco/<task>_<version>.py; where two versions differ, the table
says how. Every function computes what Gymnasium computes for one environment, in the same order of operations, so that
the numbers are equal to the last bit (tests/test_envs.py compares the two). Three facts may surprise:

- Fields derived from the state (xpos, cinert, site_xpos, ...) are those that `mj_step` leaves behind, one substep
  older than qpos and qvel. Gymnasium's observations and rewards use them so.
- Rewards are float64. Gymnasium squares a float32 action in float32; given the same action as float64 the two agree.
- v4 rewards the step on which a pendulum falls or a walker becomes unhealthy; v5 does not (`pays_fall`).

Shapes  n simulations; every field of `Rows`, every observation and every reward has n as its leading axis.

This module is longer than others because it is one table: each function below is an entry of `TASKS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
from numpy.typing import NDArray

from tipl.collecting.simulator_warnings import simulator_warnings

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Rows:
    """The MjData fields of n simulations of one model: `rows.qpos` is (n, nq), `rows.xpos` (n, nbody, 3), and so on."""

    model: Any
    """Their mujoco.MjModel."""
    dt: float
    """Seconds of one environment step: the model's timestep x frame_skip."""
    fields: Mapping[str, Floats]
    """Every simulation's fields (N, ...): qpos, qvel and the task's `derived` ones."""
    index: slice | NDArray[np.intp]
    """Indices of the n simulations among the N."""

    def __getattr__(self, name: str) -> Floats:
        try:
            return self.fields[name][self.index]
        except KeyError:
            raise AttributeError(f"Rows: {name!r} is not among the fields {sorted(self.fields)}") from None

    def body(self, name: str) -> Floats:
        """World position of a body's frame, (n, 3)."""
        return self.xpos[:, self.model.body(name).id]


@dataclass(frozen=True)
class MujocoTask:
    """The model of an environment id, and how its episodes start, are observed, rewarded and end."""

    model_file: str
    """File name in the gymnasium package's folder of models."""
    frame_skip: int
    reset: Callable[[np.random.Generator, Floats, int], tuple[Floats, Floats]]
    """(rng, the model's default qpos (nq,), nv) -> the first qpos (nq,) and qvel (nv,) of an episode.

    It draws from the generator what Gymnasium draws, in the same order, so that equal seeds give equal episodes.
    """
    observe: Callable[[Rows], Floats]
    """The observations (n, obs_dim)."""
    score: Callable[[Rows, Floats, Floats], tuple[Floats, Bools]]
    """(rows after the step, actions (n, act_dim), `before` as of before the step (n,)) -> rewards, terminated (n,)."""
    before: Callable[[Rows], Floats] | None = None
    """What `score` needs to know about the state before the step, (n,); None where it needs nothing."""
    derived: tuple[str, ...] = ()
    """The MjData fields that the task reads besides qpos and qvel."""

    def load_model(self) -> Any:
        """Return the task's mujoco.MjModel, from the installed gymnasium package."""
        path = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / self.model_file
        with simulator_warnings():
            return mujoco.MjModel.from_xml_path(str(path))


# Reset noise.


def uniform(scale: float) -> Callable[[np.random.Generator, Floats, int], tuple[Floats, Floats]]:
    """Positions and velocities within `scale` of the model's defaults."""

    def reset(rng: np.random.Generator, qpos0: Floats, nv: int) -> tuple[Floats, Floats]:
        qpos = qpos0 + rng.uniform(-scale, scale, qpos0.size)
        return qpos, rng.uniform(-scale, scale, nv)

    return reset


def normal_velocity(scale: float) -> Callable[[np.random.Generator, Floats, int], tuple[Floats, Floats]]:
    """Positions within `scale` of the model's defaults, velocities normal with that standard deviation."""

    def reset(rng: np.random.Generator, qpos0: Floats, nv: int) -> tuple[Floats, Floats]:
        qpos = qpos0 + rng.uniform(-scale, scale, qpos0.size)
        return qpos, scale * rng.standard_normal(nv)

    return reset


def reset_reacher(rng: np.random.Generator, qpos0: Floats, nv: int) -> tuple[Floats, Floats]:
    """A target uniform in the disc of radius 0.2 (the last two positions), an arm almost stretched and at rest."""
    qpos = qpos0 + rng.uniform(-0.1, 0.1, qpos0.size)
    while True:
        qpos[-2:] = rng.uniform(-0.2, 0.2, 2)
        if np.linalg.norm(qpos[-2:]) < 0.2:
            break
    qvel = rng.uniform(-0.005, 0.005, nv)
    qvel[-2:] = 0.0
    return qpos, qvel


def reset_pusher(rng: np.random.Generator, qpos0: Floats, nv: int) -> tuple[Floats, Floats]:
    """A cylinder at least 0.17 from the goal (the last four positions are cylinder, goal), an arm almost at rest."""
    qpos = qpos0.copy()
    qpos[-2:] = 0.0
    while True:
        qpos[-4] = rng.uniform(-0.3, 0.0)
        qpos[-3] = rng.uniform(-0.2, 0.2)
        if np.linalg.norm(qpos[-4:-2]) > 0.17:
            break
    qvel = rng.uniform(-0.005, 0.005, nv)
    qvel[-4:] = 0.0
    return qpos, qvel


# Observations.


def state(skip: int = 0, max_speed: float = np.inf) -> Callable[[Rows], Floats]:
    """Positions without the first `skip` (the absolute ones), then velocities clipped to +-max_speed."""

    def observe(rows: Rows) -> Floats:
        qvel = rows.qvel if max_speed == np.inf else np.clip(rows.qvel, -max_speed, max_speed)
        return np.concatenate((rows.qpos[:, skip:], qvel), axis=1)

    return observe


def observe_ant_v5(rows: Rows) -> Floats:
    contact = np.clip(flat(rows.cfrc_ext[:, 1:]), -1.0, 1.0)  # body 0 is the world
    return np.concatenate((rows.qpos[:, 2:], rows.qvel, contact), axis=1)


def observe_humanoid(first_body: int, first_dof: int) -> Callable[[Rows], Floats]:
    """v4 includes the world body and the root's unactuated degrees of freedom, which are always zero; v5 does not."""

    def observe(rows: Rows) -> Floats:
        parts = (
            rows.qpos[:, 2:],
            rows.qvel,
            flat(rows.cinert[:, first_body:]),
            flat(rows.cvel[:, first_body:]),
            rows.qfrc_actuator[:, first_dof:],
            flat(rows.cfrc_ext[:, first_body:]),
        )
        return np.concatenate(parts, axis=1)

    return observe


def observe_double_pendulum(constraints: int) -> Callable[[Rows], Floats]:
    """Includes the first `constraints` constraint forces: all three in v4, in v5 only the cart's (others are zero)."""

    def observe(rows: Rows) -> Floats:
        qpos, angles = rows.qpos, rows.qpos[:, 1:]
        forces = np.clip(rows.qfrc_constraint[:, :constraints], -10.0, 10.0)
        parts = (qpos[:, :1], np.sin(angles), np.cos(angles), np.clip(rows.qvel, -10.0, 10.0), forces)
        return np.concatenate(parts, axis=1)

    return observe


def observe_reacher(axes: int) -> Callable[[Rows], Floats]:
    """Includes the first `axes` coordinates of the vector from target to fingertip; v4 has z too, always zero."""

    def observe(rows: Rows) -> Floats:
        qpos, angles = rows.qpos, rows.qpos[:, :2]
        reach = rows.body("fingertip") - rows.body("target")
        return np.concatenate((np.cos(angles), np.sin(angles), qpos[:, 2:], rows.qvel[:, :2], reach[:, :axes]), axis=1)

    return observe


def observe_pusher(rows: Rows) -> Floats:
    parts = (rows.qpos[:, :7], rows.qvel[:, :7], rows.body("tips_arm"), rows.body("object"), rows.body("goal"))
    return np.concatenate(parts, axis=1)


# Rewards and terminations.


def score_pendulum(pays_fall: bool) -> Callable[[Rows, Floats, Floats], tuple[Floats, Bools]]:
    """Reward 1 per step; with `pays_fall` (v4) also for the step on which the pendulum falls."""

    def score(rows: Rows, actions: Floats, before: Floats) -> tuple[Floats, Bools]:
        qpos, qvel = rows.qpos, rows.qvel
        finite = np.isfinite(qpos).all(axis=1) & np.isfinite(qvel).all(axis=1)
        terminated = ~finite | (np.abs(qpos[:, 1]) > 0.2)
        return (np.ones(len(qpos)) if pays_fall else (~terminated).astype(np.float64)), terminated

    return score


def score_double_pendulum(pays_fall: bool) -> Callable[[Rows, Floats, Floats], tuple[Floats, Bools]]:
    """Reward 10 per step, less penalties on the tip's distance and the speeds; `pays_fall` as above."""

    def score(rows: Rows, actions: Floats, before: Floats) -> tuple[Floats, Bools]:
        tip = rows.site_xpos[:, 0]  # (n, 3)
        x, y = tip[:, 0], tip[:, 2]
        v1, v2 = rows.qvel[:, 1], rows.qvel[:, 2]
        terminated = y <= 1
        # float_power calls the C library's pow, as ** does on Gymnasium's scalars; on an array, ** 2 multiplies, which
        # may differ by 1 ulp.
        distance_penalty = 0.01 * np.float_power(x, 2) + np.float_power(y - 2, 2)
        speed_penalty = 1e-3 * np.float_power(v1, 2) + 5e-3 * np.float_power(v2, 2)
        alive = 10.0 if pays_fall else 10.0 * ~terminated
        return alive - distance_penalty - speed_penalty, terminated

    return score


def reach_distance(rows: Rows) -> Floats:
    return norm(rows.body("fingertip") - rows.body("target"))


def score_reacher_v4(rows: Rows, actions: Floats, before: Floats) -> tuple[Floats, Bools]:
    """v4 uses the distance before the step."""
    return -before - sum_of_squares(actions), never(rows)


def score_reacher_v5(rows: Rows, actions: Floats, before: Floats) -> tuple[Floats, Bools]:
    return -reach_distance(rows) - sum_of_squares(actions), never(rows)


def score_pusher(rows: Rows, actions: Floats, before: Floats) -> tuple[Floats, Bools]:
    cylinder = rows.body("object")
    near = -norm(cylinder - rows.body("tips_arm")) * 0.5
    distance = -norm(cylinder - rows.body("goal"))
    return distance + -sum_of_squares(actions) * 0.1 + near, never(rows)


def score_standup(rows: Rows, actions: Floats, before: Floats) -> tuple[Floats, Bools]:
    height = rows.qpos[:, 2] / rows.model.opt.timestep
    impact_cost = np.minimum(0.5e-6 * sum_of_squares(flat(rows.cfrc_ext)), 10.0)
    return height - 0.1 * sum_of_squares(actions) - impact_cost + 1, never(rows)


def locomotion(
    model_file: str,
    frame_skip: int,
    reset: Callable[[np.random.Generator, Floats, int], tuple[Floats, Floats]],
    observe: Callable[[Rows], Floats],
    x: Callable[[Rows], Floats],
    *,
    control_cost: float,
    forward_reward: float = 1.0,
    healthy: Callable[[Rows], Bools] | None = None,
    healthy_reward: float = 0.0,
    pays_fall: bool = False,
    contact_cost: Callable[[Rows], Floats] | None = None,
    derived: tuple[str, ...] = (),
) -> MujocoTask:
    """A task that rewards speed along x and being healthy, charges control and contact, and ends when unhealthy.

    With `pays_fall` (v4) the last, unhealthy step gets the healthy reward too.
    """

    def score(rows: Rows, actions: Floats, before: Floats) -> tuple[Floats, Bools]:
        reward = forward_reward * ((x(rows) - before) / rows.dt)
        unhealthy = never(rows) if healthy is None else ~healthy(rows)
        reward = reward + (healthy_reward if pays_fall else healthy_reward * ~unhealthy)
        cost = control_cost * sum_of_squares(actions)
        if contact_cost is not None:
            cost = cost + contact_cost(rows)
        return reward - cost, unhealthy

    return MujocoTask(model_file, frame_skip, reset, observe, score, before=x, derived=derived)


def root_x(rows: Rows) -> Floats:
    return rows.qpos[:, 0]


def torso_x(rows: Rows) -> Floats:
    return rows.xpos[:, 1, 0]  # body 1 is the torso


def center_of_mass_x(rows: Rows) -> Floats:
    mass = rows.model.body_mass
    # Summed over all axes j, although only x is used, so that bodies b are added in the order of Gymnasium's "b,bj->j".
    moment: Floats = np.einsum("b,nbj->nj", mass, rows.xipos)
    x: Floats = moment[:, 0] / mass.sum()
    return x


def healthy_hopper(rows: Rows) -> Bools:
    qpos = rows.qpos
    inside = (np.abs(qpos[:, 2:]) < 100.0).all(axis=1) & (np.abs(rows.qvel) < 100.0).all(axis=1)
    return inside & (qpos[:, 1] > 0.7) & (qpos[:, 1] < np.inf) & (np.abs(qpos[:, 2]) < 0.2)


def healthy_walker(rows: Rows) -> Bools:
    z, angle = rows.qpos[:, 1], rows.qpos[:, 2]
    return (0.8 < z) & (z < 2.0) & (-1.0 < angle) & (angle < 1.0)


def healthy_ant(rows: Rows) -> Bools:
    qpos = rows.qpos
    finite = np.isfinite(qpos).all(axis=1) & np.isfinite(rows.qvel).all(axis=1)
    return finite & (0.2 <= qpos[:, 2]) & (qpos[:, 2] <= 1.0)


def healthy_humanoid(rows: Rows) -> Bools:
    z = rows.qpos[:, 2]
    return (1.0 < z) & (z < 2.0)


def contact_cost_ant(rows: Rows) -> Floats:
    return 5e-4 * sum_of_squares(np.clip(flat(rows.cfrc_ext), -1.0, 1.0))


def contact_cost_humanoid(rows: Rows) -> Floats:
    return np.minimum(5e-7 * sum_of_squares(flat(rows.cfrc_ext)), 10.0)


# Arithmetic, row by row.


def sum_of_squares(values: Floats) -> Floats:
    total: Floats = np.square(values).sum(axis=1)
    return total


def norm(vectors: Floats) -> Floats:
    """Euclidean length of each row, by the dot product that np.linalg.norm uses for one vector (not for a matrix)."""
    squares: Floats = (vectors[:, None, :] @ vectors[:, :, None])[:, 0, 0]
    return np.sqrt(squares)


def flat(values: Floats) -> Floats:
    return values.reshape(len(values), -1)


def never(rows: Rows) -> Bools:
    return np.zeros(len(rows.qpos), dtype=np.bool_)


def tasks(v5: bool) -> dict[str, MujocoTask]:
    """Gymnasium's MuJoCo tasks by name, in version 5 or version 4. Long because it is the table."""
    humanoid_fields = ("xipos", "cinert", "cvel", "qfrc_actuator", "cfrc_ext")
    observe_body = observe_humanoid(first_body=1, first_dof=6) if v5 else observe_humanoid(first_body=0, first_dof=0)
    return {
        "InvertedPendulum": MujocoTask(
            "inverted_pendulum.xml", 2, uniform(0.01), state(), score_pendulum(pays_fall=not v5)
        ),
        "InvertedDoublePendulum": MujocoTask(
            "inverted_double_pendulum.xml",
            5,
            normal_velocity(0.1),
            observe_double_pendulum(constraints=1 if v5 else 3),
            score_double_pendulum(pays_fall=not v5),
            derived=("site_xpos", "qfrc_constraint"),
        ),
        "HalfCheetah": locomotion("half_cheetah.xml", 5, normal_velocity(0.1), state(skip=1), root_x, control_cost=0.1),
        "Hopper": locomotion(
            "hopper.xml",
            4,
            uniform(0.005),
            state(skip=1, max_speed=10.0),
            root_x,
            control_cost=0.001,
            healthy=healthy_hopper,
            healthy_reward=1.0,
            pays_fall=not v5,
        ),
        "Walker2d": locomotion(
            "walker2d_v5.xml" if v5 else "walker2d.xml",
            4,
            uniform(0.005),
            state(skip=1, max_speed=10.0),
            root_x,
            control_cost=0.001,
            healthy=healthy_walker,
            healthy_reward=1.0,
            pays_fall=not v5,
        ),
        "Ant": locomotion(
            "ant.xml",
            5,
            normal_velocity(0.1),
            observe_ant_v5 if v5 else state(skip=2),
            torso_x,
            control_cost=0.5,
            contact_cost=contact_cost_ant if v5 else None,
            healthy=healthy_ant,
            healthy_reward=1.0,
            pays_fall=not v5,
            derived=("xpos", "cfrc_ext") if v5 else ("xpos",),
        ),
        "Humanoid": locomotion(
            "humanoid.xml",
            5,
            uniform(0.01),
            observe_body,
            center_of_mass_x,
            forward_reward=1.25,
            control_cost=0.1,
            contact_cost=contact_cost_humanoid if v5 else None,
            healthy=healthy_humanoid,
            healthy_reward=5.0,
            pays_fall=not v5,
            derived=humanoid_fields,
        ),
        "HumanoidStandup": MujocoTask(
            "humanoidstandup.xml", 5, uniform(0.01), observe_body, score_standup, derived=humanoid_fields
        ),
        "Swimmer": locomotion("swimmer.xml", 4, uniform(0.1), state(skip=2), root_x, control_cost=0.0001),
        "Reacher": MujocoTask(
            "reacher.xml",
            2,
            reset_reacher,
            observe_reacher(axes=2 if v5 else 3),
            score_reacher_v5 if v5 else score_reacher_v4,
            before=None if v5 else reach_distance,
            derived=("xpos",),
        ),
        # Gymnasium refuses Pusher-v4 on MuJoCo >= 3.
        **(
            {"Pusher": MujocoTask("pusher_v5.xml", 5, reset_pusher, observe_pusher, score_pusher, derived=("xpos",))}
            if v5
            else {}
        ),
    }


TASKS: dict[str, MujocoTask] = {
    f"{name}-{version}": task for version in ("v4", "v5") for name, task in tasks(version == "v5").items()
}
