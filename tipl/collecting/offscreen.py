"""Pictures of a MuJoCo simulation without a screen: OpenGL through EGL or OSMesa, whichever works here.

mujoco is imported late: where MUJOCO_GL names a platform that does not work, importing it fails in words of PyOpenGL's.
"""

import contextlib
import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Frame: TypeAlias = NDArray[np.uint8]  # (height, width, 3), RGB
Render: TypeAlias = Callable[[NDArray[np.float64]], Frame]

_PROBE = (
    "import importlib, mujoco\n"
    "context = importlib.import_module('mujoco.{0}').GLContext(64, 64)\n"
    "context.make_current()\n"
    "mujoco.MjrContext(mujoco.MjModel.from_xml_string('<mujoco/>'), mujoco.mjtFontScale.mjFONTSCALE_150)\n"
)


@functools.cache
def offscreen_platform() -> str:
    """Return which of mujoco's OpenGL platforms works here, "egl" or "osmesa"; MUJOCO_GL, where it is set, decides.

    Each is tried in a process of its own, because one that fails spoils the process for the other. Raises RuntimeError
    where neither works.
    """
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    for platform in (chosen,) if chosen in ("egl", "osmesa", "glfw") else ("egl", "osmesa"):
        others = {name: value for name, value in os.environ.items() if name != "PYOPENGL_PLATFORM"}
        command = [sys.executable, "-c", _PROBE.format(platform)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            tried = subprocess.run(command, env=others | {"MUJOCO_GL": platform}, capture_output=True, timeout=60)
            if tried.returncode == 0:
                return platform
    wanted = f"MUJOCO_GL={chosen} does not work" if chosen else "neither EGL nor OSMesa works"
    raise RuntimeError(
        f"record_video: nothing can be drawn without a screen, because {wanted} here: install libegl1 with a driver "
        "such as libegl-mesa0, or libosmesa6 (names of Debian's packages)"
    )


@contextlib.contextmanager
def open_renderer(model: Any, width: int, height: int) -> Iterator[Render]:
    """Yield a function that draws a state of MuJoCo's (nstate,), mjSTATE_INTEGRATION, as a picture (height, width, 3).

    The camera is the model's own, which follows the body, where it has one. Raises RuntimeError where nothing can be
    drawn without a screen.
    """
    platform = offscreen_platform()
    import mujoco

    from tipl.collecting.simulator_warnings import simulator_warnings

    context = importlib.import_module(f"mujoco.{platform}").GLContext(width, height)
    context.make_current()
    model.vis.global_.offwidth, model.vis.global_.offheight = width, height
    with simulator_warnings():
        on_card = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, on_card)
        scene, data, option = mujoco.MjvScene(model, maxgeom=10_000), mujoco.MjData(model), mujoco.MjvOption()
        camera, area = _camera(model, data), mujoco.MjrRect(0, 0, width, height)

    def render(state: NDArray[np.float64]) -> Frame:
        with simulator_warnings():
            mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
            mujoco.mj_forward(model, data)
            mujoco.mjv_updateScene(model, data, option, None, camera, mujoco.mjtCatBit.mjCAT_ALL, scene)
            mujoco.mjr_render(area, scene, on_card)
            picture = np.empty((height, width, 3), np.uint8)
            mujoco.mjr_readPixels(picture, None, area, on_card)
        return picture[::-1]  # OpenGL's first row is the lowest

    try:
        yield render
    finally:
        on_card.free()
        context.free()


def _camera(model: Any, data: Any) -> Any:
    """Return the camera that the model calls "track", else one that sees all of it but its floor."""
    import mujoco

    camera = mujoco.MjvCamera()
    mujoco.mjv_defaultFreeCamera(model, camera)
    tracking = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    if tracking >= 0:
        camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, tracking
        return camera
    mujoco.mj_forward(model, data)
    solid = model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE
    places = data.geom_xpos[solid]
    camera.lookat[:] = places.mean(0)
    camera.distance = 2.2 * (np.linalg.norm(places - camera.lookat, axis=1) + model.geom_rbound[solid]).max()
    return camera
