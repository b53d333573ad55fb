"""Videos: the episodes are the judged ones, to the bit; what is drawn and encoded, with stand-ins and for real."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mujoco
import numpy as np
import pytest
from factories import SPEC, make_store
from numpy.typing import NDArray

import tipl
from tipl.collecting import offscreen
from tipl.collecting.envs import MujocoVectorEnv, make_vec
from tipl.collecting.episodes import Recording, record_episodes, run_episodes
from tipl.collecting.mujoco_tasks import TASKS
from tipl.policy import ParameterLayout, PolicySpec
from tipl.report import video as module
from tipl.report.video import film, shown_steps
from tipl.storing.store import Store

ENV_ID = "InvertedPendulum-v5"
NAMES = ("one", "two", "three")


def random_policies(policy: PolicySpec, number: int = 3) -> NDArray[np.float32]:
    """Policies of which some hold a pendulum longer than others."""
    return (0.4 * np.random.default_rng(3).standard_normal((number, policy.num_params))).astype(np.float32)


def positions_and_speeds(env_id: str, states: NDArray[np.float64]) -> NDArray[np.float64]:
    """What MuJoCo's states (S, nstate) say of positions and velocities, (S, nq + nv)."""
    model = TASKS[env_id].load_model()
    data, rows = mujoco.MjData(model), []
    for state in states:
        mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        rows.append(np.concatenate([data.qpos, data.qvel]))
    return np.array(rows)


# ---------------------------------------------------------------- the episodes


def test_every_seed_that_a_video_takes_can_be_run() -> None:
    assert record_episodes(ENV_ID, SPEC, random_policies(SPEC), 2**63 - 1).lengths.min() > 0


def test_what_is_recorded_is_what_is_judged() -> None:
    weights = random_policies(SPEC)
    recording = record_episodes(ENV_ID, SPEC, weights, 11)
    judged = run_episodes(ENV_ID, SPEC, weights, np.array([11]), num_states=1000)
    np.testing.assert_array_equal(recording.returns[-1], judged.returns[:, 0])
    assert len(set(recording.lengths.tolist())) > 1
    assert recording.states.shape[:2] == (recording.lengths.max(), 3)
    assert len(recording.returns) == len(recording.states) + 1
    np.testing.assert_array_equal(recording.returns[0], 0.0)
    for i, length in enumerate(recording.lengths):
        # The states that it acted on, whose sample was large enough for all of them: only their order is lost.
        seen = positions_and_speeds(ENV_ID, recording.states[:length, i]).astype(np.float32)
        np.testing.assert_array_equal(np.sort(seen, axis=0), np.sort(judged.states[i], axis=0))
        assert (recording.returns[length:, i] == recording.returns[-1, i]).all()
        assert (recording.states[length:, i] == recording.states[length - 1, i]).all()
    np.testing.assert_array_equal(recording.states[0], recording.states[0, :1].repeat(3, 0))  # the same start
    other = record_episodes(ENV_ID, SPEC, weights[:1], 12)
    assert not np.array_equal(other.states[0, 0], recording.states[0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Hopper-v5", "Ant-v5", "Reacher-v4"])
def test_of_every_kind_of_task_the_returns_are_the_judged_ones(env_id: str) -> None:
    env = make_vec(env_id, 1, seeds=[0], num_threads=1)
    policy = PolicySpec(env.obs_dim, env.act_dim, (8,))
    weights = random_policies(policy, 2)
    recording = record_episodes(env_id, policy, weights, 5)
    alone = np.concatenate([run_episodes(env_id, policy, one[None], np.array([5])).returns[0] for one in weights])
    np.testing.assert_array_equal(recording.returns[-1], alone)


def test_a_task_whose_state_cannot_be_read_is_refused() -> None:
    policy = PolicySpec(obs_dim=3, act_dim=1, hidden_sizes=(4,))
    with pytest.raises(
        ValueError, match=r"env_id must be a MuJoCo task of Gymnasium's, whose state can be read, got 'Pendulum-v1'"
    ):
        record_episodes("Pendulum-v1", policy, random_policies(policy, 1), 0)


# ---------------------------------------------------------------- what is drawn


@pytest.mark.parametrize(
    ("length", "every", "limit", "expected"),
    [
        (5, 1, 100, [0, 1, 2, 3, 4, 5]),
        (5, 2, 100, [0, 2, 4, 5]),
        (6, 2, 100, [0, 2, 4, 6]),
        (1000, 4, 10, [0, 4, 8]),
        (1, 4, 9, [0, 1]),
        (8, 3, 8, [0, 3, 6, 8]),
    ],
)
def test_every_nth_state_is_drawn_and_the_end(length: int, every: int, limit: int, expected: list[int]) -> None:
    assert shown_steps(length, every, limit) == expected


def test_a_picture_has_a_panel_for_each_policy_and_an_ended_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    states = np.arange(4.0)[:, None, None] + np.array([0.0, 10.0])[:, None]  # (S, M, 1)
    states[2:, 1] = states[1, 1]
    returns = np.array([[0, 0], [1, 5], [2, 7], [3, 7], [4, 7]], float)
    drawn, said = [], []

    def render(state: NDArray[np.float64]) -> NDArray[np.uint8]:
        drawn.append(float(state[0]))
        return np.full((6, 8, 3), state[0], np.uint8)

    class Caption:
        def __call__(self, name: str, text: str, width: int) -> NDArray[np.uint8]:
            said.append(f"{name}: {text}")
            return np.full((2, width, 3), 99, np.uint8)

    monkeypatch.setattr(module, "_Caption", Caption)
    recording = Recording(states, returns, np.array([4, 2]))
    pictures = list(film(recording, ["long", "short"], [0, 1, 2, 3, 4], 0.5, render))
    assert drawn == [0, 10, 1, 11, 2, 3]
    assert {it.shape for it in pictures} == {(8, 8 + 4 + 8, 3)}
    assert [(it[-1, 0, 0], it[-1, -1, 0]) for it in pictures] == [(0, 10), (1, 11), (2, 11), (3, 11), (3, 11)]
    assert (pictures[0][:2, :8] == 99).all()
    assert said[2:] == [
        "long: return 1.0, 0.5 s",
        "short: return 5.0, 0.5 s",
        "long: return 2.0, 1.0 s",
        "short: return 7.0, ended after 1.0 s",
        "long: return 3.0, 1.5 s",
        "short: return 7.0, ended after 1.0 s",
        "long: return 4.0, ended after 2.0 s",
        "short: return 7.0, ended after 1.0 s",
    ]


def test_a_caption_is_black_on_white_and_as_wide_as_its_panel() -> None:
    caption = module._Caption()
    strip = caption("TIPL's forecast", "return 1,234.5, 3.2 s", 200)
    assert strip.shape == (46, 200, 3)
    assert strip.dtype == np.uint8
    assert strip[0].min() > 250
    assert strip[:, :120].min() < 80
    assert not np.array_equal(strip, caption("TIPL's forecast", "return 1,234.6, 3.2 s", 200))


# ---------------------------------------------------------------- the file


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A renderer that paints and an encoder that counts, in place of OpenGL and ffmpeg."""
    seen = SimpleNamespace(frames=[], settings={}, sizes=[])

    @contextlib.contextmanager
    def open_renderer(model: Any, width: int, height: int) -> Iterator[Callable[..., NDArray[np.uint8]]]:
        seen.sizes.append((width, height))
        yield lambda state: np.full((height, width, 3), int(1e4 * abs(state).sum()) % 256, np.uint8)

    def write_frames(path: str, size: tuple[int, int], **settings: Any) -> Iterator[None]:
        seen.settings = {"size": size, **settings}
        Path(path).write_bytes(b"")
        while True:
            seen.frames.append((yield))
            with open(path, "ab") as file:
                file.write(b".")

    monkeypatch.setattr(module, "open_renderer", open_renderer)

    def count(path: str) -> tuple[int, float]:
        return Path(path).stat().st_size, 0.0

    encoder = SimpleNamespace(write_frames=write_frames, count_frames_and_secs=count)
    monkeypatch.setattr(module, "_ffmpeg", lambda: encoder)
    seen.encoder = encoder
    return seen


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("video") / "store.zarr", 1, 6)


def test_a_video_holds_all_policies_and_returns_their_returns(
    store: Store, stand_ins: SimpleNamespace, tmp_path: Path
) -> None:
    weights = random_policies(SPEC)
    path = tmp_path / "new" / "video.mp4"
    policies = dict(zip(NAMES, weights, strict=True))
    returns = tipl.record_video(path, store, policies, seed=11, seconds=60.0, width=100, height=80, progress=False)
    expected = run_episodes(ENV_ID, SPEC, weights, np.array([11])).returns[:, 0]
    assert returns == dict(zip(NAMES, expected.tolist(), strict=True))
    length = int(expected.max())  # the pendulum pays 1 a step, but not for its fall
    assert stand_ins.sizes == [(100, 80)]
    assert stand_ins.settings["size"] == (3 * 100 + 2 * 4, 80 + 46)
    assert stand_ins.settings["fps"] == pytest.approx(25.0)  # 0.04 s a step
    assert len(stand_ins.frames) == len(shown_steps(length + 1, 1, 10**6)) + round(1.5 * 25)
    assert {frame.shape for frame in stand_ins.frames} == {(126, 308, 3)}
    assert [it.name for it in path.parent.iterdir()] == ["video.mp4"]
    with pytest.raises(FileExistsError, match=r"record_video: output .*video\.mp4 exists already"):
        tipl.record_video(path, store, policies)


def test_a_failure_leaves_nothing(store: Store, stand_ins: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    one = {"one": random_policies(SPEC)[0]}

    def stopped(path: str, size: tuple[int, int], **_: Any) -> Iterator[None]:
        Path(path).write_bytes(b"some")
        yield
        yield
        raise OSError("Broken pipe\n\nFFMPEG COMMAND:\n...")

    def unreadable(path: str) -> tuple[int, float]:
        raise RuntimeError("no moov atom")

    for name, fails, message in (
        ("count_frames_and_secs", lambda path: (3, 0.0), "ffmpeg did not write all of the video: is the disk full"),
        ("count_frames_and_secs", unreadable, "ffmpeg did not write all of the video"),
        ("write_frames", stopped, "record_video: ffmpeg stopped: Broken pipe$"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(stand_ins.encoder, name, fails)
            with pytest.raises(OSError, match=message):
                tipl.record_video(tmp_path / "video.mp4", store, one, progress=False)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"path": "video.gif"}, ValueError, r"path must end in \.mp4, got video\.gif"),
        ({"policies": {}}, ValueError, "policies must be between 1 and 6, got 0"),
        ({"policies": {"a": np.zeros(3, np.float32)}}, ValueError, r"policies\['a'\] must be finite .* got \(3,\)"),
        ({"policies": {"a": np.zeros(SPEC.num_params)}}, TypeError, "must be a float32 array, got float64"),
        ({"policies": {"a": [0.0]}}, TypeError, "must be a float32 array, got list"),
        ({"policies": {"a": np.full(SPEC.num_params, np.nan, np.float32)}}, ValueError, "got NaN or Inf"),
        ({"seed": -1}, ValueError, r"seed must lie in \[0, 2\*\*63\), got -1"),
        ({"seed": 2**63}, ValueError, r"seed must lie in \[0, 2\*\*63\), got 9223372036854775808"),
        ({"seconds": 0.0}, ValueError, r"seconds must be positive, got 0\.0"),
        ({"width": 101}, ValueError, r"width must be even and lie in \[64, 2048\], got 101"),
        ({"height": 4000}, ValueError, r"height must be even and lie in \[64, 2048\], got 4000"),
    ],
)
def test_what_cannot_be_filmed_is_refused(changed, error, message, store, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {"path": "video.mp4", "store": store, "policies": {"one": random_policies(SPEC)[0]}} | changed
    with pytest.raises(error, match=f"record_video: .*{message}"):
        tipl.record_video(**arguments)
    assert not list(tmp_path.iterdir())


def test_stores_that_cannot_be_filmed_are_refused(tmp_path: Path) -> None:
    one = {"one": np.zeros(2, np.float32)}
    for name, env_id, policy, message in (
        ("other.zarr", ENV_ID, ParameterLayout((("w", (2,)),)), "the simulator can run only MLPs that it knows"),
        (
            "task.zarr",
            "Pendulum-v1",
            SPEC,
            "env_id must be a MuJoCo task of Gymnasium's, whose state can be read, got 'Pendulum-v1'",
        ),
    ):
        Store.create(tmp_path / name, env_id=env_id, policy=policy, seeds=[0], config={}).close()
        with pytest.raises(ValueError, match=f"record_video: .*{message}"):
            tipl.record_video(tmp_path / "video.mp4", Store.open(tmp_path / name), one)


def test_a_missing_package_is_named_with_its_extra(store: Store, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ValueError, match=r"imageio-ffmpeg is not installed: pip install 'tipl\[video\]'"):
        tipl.record_video(tmp_path / "video.mp4", store, {"one": random_policies(SPEC)[0]})


# ---------------------------------------------------------------- OpenGL


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    offscreen.offscreen_platform.cache_clear()
    yield
    offscreen.offscreen_platform.cache_clear()


def tried_platforms(monkeypatch: pytest.MonkeyPatch, working: str | None) -> list[str]:
    """Return a list that fills with the platforms that are tried, of which one works."""
    tried = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        assert "PYOPENGL_PLATFORM" not in env
        tried.append(env["MUJOCO_GL"])
        if env["MUJOCO_GL"] == "egl" and working is None:
            raise subprocess.TimeoutExpired(command, 60)
        return SimpleNamespace(returncode=int(env["MUJOCO_GL"] != working))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("PYOPENGL_PLATFORM", "egl")
    return tried


def test_the_first_platform_that_works_is_taken(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    tried = tried_platforms(monkeypatch, "osmesa")
    assert offscreen.offscreen_platform() == offscreen.offscreen_platform() == "osmesa"
    assert tried == ["egl", "osmesa"]
    offscreen.offscreen_platform.cache_clear()
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert offscreen.offscreen_platform() == "osmesa"
    assert tried == ["egl", "osmesa", "osmesa"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [("", "neither EGL nor OSMesa works here"), ("osmesa", "MUJOCO_GL=osmesa does not work here")],
)
def test_where_nothing_works_it_says_what_to_install(
    chosen: str, message: str, fresh_choice: None, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUJOCO_GL", chosen)
    monkeypatch.setattr(module, "_ffmpeg", lambda: None)
    tried_platforms(monkeypatch, None)
    with pytest.raises(RuntimeError, match=f"{message}: install libegl1 with a driver .*, or libosmesa6"):
        tipl.record_video(tmp_path / "video.mp4", store, {"one": random_policies(SPEC)[0]})
    assert not list(tmp_path.iterdir())


def real_platform() -> str:
    offscreen.offscreen_platform.cache_clear()
    try:
        return offscreen.offscreen_platform()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_real_pictures_show_the_simulation() -> None:
    real_platform()
    for env_id in ("InvertedDoublePendulum-v5", "HalfCheetah-v5"):
        env = make_vec(env_id, 1, seeds=[0], num_threads=1)
        assert isinstance(env, MujocoVectorEnv)
        env.reset()
        states = [env.get_state().simulations[0]]
        for _ in range(10):
            env.step(np.ones((1, env.act_dim)))
        states.append(env.get_state().simulations[0])
        with offscreen.open_renderer(TASKS[env_id].load_model(), 96, 64) as render:
            before, after, again = render(states[0]), render(states[1]), render(states[0])
        assert before.shape == (64, 96, 3)
        assert before.dtype == np.uint8
        assert len(np.unique(before.reshape(-1, 3), axis=0)) > 20
        np.testing.assert_array_equal(before, again)
        assert np.mean(np.any(before != after, axis=2)) > 0.01


@pytest.mark.slow
def test_a_real_file_holds_the_pictures_in_the_tasks_own_time(store: Store, tmp_path: Path, monkeypatch) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")

    @contextlib.contextmanager
    def open_renderer(model: Any, width: int, height: int) -> Iterator[Callable[..., NDArray[np.uint8]]]:
        yield lambda state: np.full((height, width, 3), (200, 60, 20), np.uint8)

    monkeypatch.setattr(module, "open_renderer", open_renderer)
    path = tmp_path / "video.mp4"
    policies = dict(zip(NAMES, random_policies(SPEC), strict=True))
    tipl.record_video(path, store, policies, seconds=0.4, width=100, height=80, progress=False)
    command = [ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    decoded = subprocess.run(command, capture_output=True, check=True)
    frames = np.frombuffer(decoded.stdout, np.uint8).reshape(-1, 126, 308, 3)
    assert b", 25 fps" in decoded.stderr
    longest = int(record_episodes(ENV_ID, SPEC, random_policies(SPEC), 0).lengths.max())
    assert len(frames) == min(longest, 10) + 1 + 38  # the first 0.4 s, and 1.5 s of the last picture
    np.testing.assert_allclose(frames[3][100, 50], (200, 60, 20), atol=12)
    assert [it.name for it in tmp_path.iterdir()] == ["video.mp4"]


@pytest.mark.parametrize(
    ("env_id", "num_checkpoints", "arguments", "message"),
    [
        (ENV_ID, 20, ["--prefix", 1], "video: prefix 1 of a path of 20 checkpoints leaves nothing to forecast: choose"),
        (
            ENV_ID,
            20,
            ["--every", 25],
            "video: prefix 0.4 of every 25 of 20 checkpoints must hold at least 4, got 1: choose",
        ),
        (ENV_ID, 5, [], "video: prefix 0.4 of a path of 5 checkpoints must hold at least 4, got 3: choose a larger"),
        (ENV_ID, 200, ["--every", 1], "video: prefix 0.4 of a path of 200 checkpoints must leave room for a forecast"),
        (ENV_ID, 100, ["--every", 1], "cannot be continued to the end: the model knows paths of 51; choose a larger"),
        (
            "CartPole-v1",
            5,
            [],
            "env_id must be a MuJoCo task of Gymnasium's, whose state can be read, got 'CartPole-v1'",
        ),
        (ENV_ID, 20, ["--output", "file/y.mp4"], "y.mp4 cannot be made: file is a file, not a folder"),
    ],
)
def test_the_command_says_first_what_is_wrong(
    env_id, num_checkpoints, arguments, message, tmp_path, run_tipl, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(offscreen, "offscreen_platform", lambda: "egl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    make_store(tmp_path / "store.zarr", 1, num_checkpoints, env_id)
    assert run_tipl("video", "--store", "store.zarr", "--output", "video.mp4", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert {it.name for it in tmp_path.iterdir()} == {"file", "store.zarr"}


@pytest.mark.slow
def test_the_command_films_a_trial(
    stand_ins: SimpleNamespace, tmp_path: Path, run_tipl: Callable[..., int], capsys, monkeypatch
) -> None:
    from tipl.judging.evaluate_config import EvaluateConfig
    from tipl.judging.return_judgement import episode_seeds

    monkeypatch.setattr(offscreen, "offscreen_platform", lambda: "egl")
    trials, output = make_store(tmp_path / "store.zarr", 2, 20), tmp_path / "video.mp4"
    command = ["video", "--store", trials.path, "--trial", 1, "--prefix", 0.5, "--width", 100, "--height", 80]
    assert run_tipl(*command, "--output", output, "--seconds", 0.5) == 0
    said = capsys.readouterr().out.splitlines()
    seed = int(episode_seeds(EvaluateConfig(num_episodes=7), 1)[0, 0])
    assert said[-1] == f"video      {output}: the episode of seed {seed}"
    true, last = trials.trial(1).weights()[[19, 10]]
    returns = run_episodes(ENV_ID, SPEC, np.stack([last, true]), np.array([seed])).returns[:, 0]
    assert said[0] == f"return     {returns[0]:,.1f}: last observed, checkpoint 10"
    assert said[1].endswith("TIPL's forecast of 19")
    assert said[2] == f"return     {returns[1]:,.1f}: true policy, checkpoint 19"
    assert run_tipl(*command, "--output", output) == 2
    assert "exists already" in capsys.readouterr().err
    further = [*command, "--output", tmp_path / "further.mp4", "--horizon", 20, "--seed", 3, "--seconds", 0.5]
    assert run_tipl(*further) == 0  # past the end of the path: there is no true policy
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in said] == [
        "last observed, checkpoint 10",
        "TIPL's forecast of 30",
        "the episode of seed 3",
    ]
