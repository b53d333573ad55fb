"""Policies side by side in a video: the same task, the same start, each with its name and its return so far.

The episodes are those that `run_episodes` judges; a picture is drawn of every state, or of every n-th.

Shapes  M policies, p weights.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tipl.collecting.envs import make_vec
from tipl.collecting.episodes import Recording, policy_to_run, record_episodes
from tipl.collecting.offscreen import Frame, Render, open_renderer
from tipl.files.publishing import published, refuse_existing
from tipl.progress import progress_bar
from tipl.report.drawing import THEME
from tipl.storing.store import Store

MAX_POLICIES = 6
MAX_FPS = 30
"""Pictures in a second, about; of a task with more steps in a second, every n-th is drawn."""
HOLD_SECONDS = 1.5
"""How long the last picture stays."""

_CAPTION = 46  # height in pixels
_GAP = 4  # between panels


def record_video(
    path: str | Path,
    store: Store,
    policies: Mapping[str, NDArray[np.float32]],
    *,
    seed: int = 0,
    seconds: float = 10.0,
    width: int = 400,
    height: int = 300,
    progress: bool = True,
) -> dict[str, float]:
    """Film one episode of each of some policies, side by side, into `path`, an .mp4 file; return their returns.

    All start from the same state and act deterministically. The returns are those of whole episodes, the same as
    `tipl.evaluate` and `tipl.score` find; the video shows the first `seconds` of them, in the task's own time. It needs
    the extra `video` (imageio-ffmpeg), and OpenGL through EGL or OSMesa, but no screen. The file is written whole or
    not at all.

    Args:
        store: says the task and what the weights are; its runs need not be those of the policies.
        policies: name -> weights (p,) float32, from left to right, at most six.
        seed: the seed of the episode.
        seconds: how much of the episodes is shown, in seconds of the simulation; the return so far stands above it.
        width: of one policy's picture, in pixels; even, as `height`.

    Raises FileExistsError where `path` exists; TypeError for weights that are not float32; ValueError where an argument
    is out of range, the task is no MuJoCo task of Gymnasium's, the simulator cannot run the policies, or
    imageio-ffmpeg is not installed; RuntimeError where nothing can be drawn without a screen.
    """
    path = Path(path)
    if path.suffix != ".mp4":
        raise ValueError(f"record_video: path must end in .mp4, got {path}")
    refuse_existing(path, "record_video")
    _check_numbers(seed=seed, seconds=seconds, width=width, height=height)
    policy, kwargs = policy_to_run("record_video", store), store.env_kwargs
    model, step_seconds = simulation_of(store)
    weights = _checked(policies, policy.num_params)
    ffmpeg = _ffmpeg()
    with published(path, "record_video") as aside, open_renderer(model, width, height) as render:
        recording = record_episodes(store.env_id, policy, weights, seed, kwargs)
        every = max(1, round(1 / (MAX_FPS * step_seconds)))
        shown = shown_steps(len(recording.states), every, math.ceil(seconds / step_seconds))
        with progress_bar(progress) as bar:
            drawing = bar.add_task("video", total=len(shown), note="")
            pictures = film(recording, list(policies), shown, step_seconds, render)
            _write(ffmpeg, aside, pictures, 1 / (step_seconds * every), lambda: bar.advance(drawing))
    return dict(zip(policies, recording.returns[-1].tolist(), strict=True))


def simulation_of(store: Store) -> tuple[Any, float]:
    """Return MuJoCo's model of a store's task and the seconds of a step. Raises ValueError where it has none."""
    with contextlib.closing(make_vec(store.env_id, 1, seeds=[0], num_threads=1, env_kwargs=store.env_kwargs)) as env:
        try:
            return env.simulation()
        except ValueError as error:
            raise ValueError(f"record_video: {error}") from None


def shown_steps(length: int, every: int, limit: int) -> list[int]:
    """Return which of the steps 0, 1, ... `length` are drawn: every n-th up to `limit`, and the very last."""
    steps = list(range(0, min(length, limit) + 1, every))
    return [*steps, length] if length <= limit and steps[-1] < length else steps


def film(
    recording: Recording, names: Sequence[str], steps: Sequence[int], step_seconds: float, render: Render
) -> Iterator[Frame]:
    """Yield a picture of all policies at each of some `steps`: their captions, and below what `render` draws."""
    caption, drawn = _Caption(), dict[int, tuple[int, Frame]]()  # policy -> the step that was drawn last, its picture
    for step in steps:
        panels: list[Frame] = []
        for i, name in enumerate(names):
            length = int(recording.lengths[i])
            at = min(step, length - 1)  # the state that the last action led to is not kept
            if i not in drawn or drawn[i][0] != at:
                drawn[i] = at, render(recording.states[at, i])
            seconds = step_seconds * min(step, length)
            said = f"return {recording.returns[step, i]:,.1f}"
            said += f", ended after {seconds:.1f} s" if step >= length else f", {seconds:.1f} s"
            picture = drawn[i][1]
            panels += [np.concatenate([caption(name, said, picture.shape[1]), picture])]
            panels += [np.zeros((len(panels[-1]), _GAP, 3), np.uint8)]
        yield np.concatenate(panels[:-1], axis=1)


class _Caption:
    """Draws a name and, below, a line of text, black on white."""

    def __init__(self) -> None:
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        self._bold, self._plain = (
            ImageFont.truetype(str(fonts / name), 14) for name in ("DejaVuSans-Bold.ttf", "DejaVuSans.ttf")
        )

    def __call__(self, name: str, text: str, width: int) -> Frame:
        """Return the caption (height, width, 3); what is too long is cut."""
        strip = Image.new("RGB", (width, _CAPTION), THEME["surface"][0])
        draw = ImageDraw.Draw(strip)
        draw.text((8, 5), name, THEME["ink"][0], self._bold)
        draw.text((8, 24), text, THEME["muted"][0], self._plain)
        return np.asarray(strip)


def _write(ffmpeg: Any, path: Path, pictures: Iterator[Frame], fps: float, tick: Callable[[], None]) -> None:
    """Encode pictures, of even width and height, as H.264; the last one stays for a while.

    Raises OSError where ffmpeg does not write all of them.
    """
    last, count = next(pictures), 0
    size = last.shape[1], last.shape[0]
    options = {"codec": "libx264", "quality": 7, "macro_block_size": 2, "output_params": ["-f", "mp4"]}
    writer = ffmpeg.write_frames(str(path), size, fps=fps, **options)
    writer.send(None)
    with contextlib.closing(writer):
        for picture in itertools.chain([last], pictures):
            _send(writer, picture)
            tick()
            last, count = picture, count + 1
        for _ in range(round(HOLD_SECONDS * fps)):
            _send(writer, last)
            count += 1
    with contextlib.suppress(RuntimeError):  # of a file that cannot be read
        if ffmpeg.count_frames_and_secs(str(path))[0] == count:
            return
    raise OSError("record_video: ffmpeg did not write all of the video: is the disk full?")


def _send(writer: Any, picture: Frame) -> None:
    """Give ffmpeg a picture. Raises OSError, in a line, where it has stopped."""
    try:
        writer.send(np.ascontiguousarray(picture))
    except OSError as error:
        raise OSError(f"record_video: ffmpeg stopped: {str(error).splitlines()[0]}") from error


def _check_numbers(*, seed: int, seconds: float, width: int, height: int) -> None:
    """Raise ValueError where an argument of `record_video` is out of range."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"record_video: seed must lie in [0, 2**63), got {seed}")
    if not 0.0 < seconds < math.inf:
        raise ValueError(f"record_video: seconds must be positive, got {seconds}")
    for name, value in (("width", width), ("height", height)):
        if not 64 <= value <= 2048 or value % 2:
            raise ValueError(f"record_video: {name} must be even and lie in [64, 2048], got {value}")


def _checked(policies: Mapping[str, NDArray[np.float32]], num_params: int) -> NDArray[np.float32]:
    """Return the policies' weights (M, p); raise what `record_video` does."""
    if not 1 <= len(policies) <= MAX_POLICIES:
        raise ValueError(f"record_video: policies must be between 1 and {MAX_POLICIES}, got {len(policies)}")
    for name, weights in policies.items():
        if not isinstance(weights, np.ndarray) or weights.dtype != np.float32:
            kind = weights.dtype if isinstance(weights, np.ndarray) else type(weights).__name__
            raise TypeError(f"record_video: policies[{name!r}] must be a float32 array, got {kind}")
        if weights.shape != (num_params,) or not np.isfinite(weights).all():
            raise ValueError(
                f"record_video: policies[{name!r}] must be finite and of shape (p,) = ({num_params},), got "
                f"{'NaN or Inf' if weights.shape == (num_params,) else weights.shape}"
            )
    return np.stack(list(policies.values()))


def _ffmpeg() -> Any:
    """Return the package imageio_ffmpeg. Raises ValueError where it is not installed."""
    try:
        import imageio_ffmpeg
    except ModuleNotFoundError as error:
        raise ValueError(
            "record_video: the package imageio-ffmpeg is not installed: pip install 'tipl[video]'"
        ) from error
    return imageio_ffmpeg
