"""Fixtures of several files. What they need of tipl is imported in them: all of it takes seconds."""

import gc
import io
import logging
import sys
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cuda_devices  # first of all: it loads what stands in for the CUDA runtime
import pytest

if TYPE_CHECKING:
    from hub_server import Hub

    from tipl.storing.store import Store


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """In files that say ON_EACH_DEVICE, every test runs on each device, unless it is about the CPU."""
    if getattr(metafunc.module, "ON_EACH_DEVICE", False):
        cpu_only = any(mark.name == "cpu_only" for mark in metafunc.definition.iter_markers())
        metafunc.parametrize("device", ["cpu"] if cpu_only else ["cpu", cuda_devices.CUDA], indirect=True)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the estimators of the SVD compute in this test, if they say nothing else."""
    name: str = getattr(request, "param", "cpu")
    if name != "cpu":
        from tipl.subspace.running_gram import RunningGram, gram
        from tipl.subspace.streaming_svd import StreamingSVD

        request.getfixturevalue("clean_device")
        for function in (StreamingSVD.__init__, StreamingSVD.load.__func__, RunningGram.__init__, gram):
            monkeypatch.setitem(function.__kwdefaults__, "device", name)
    return name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first: of several processes none is left alone with one in the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def run_tipl() -> Callable[..., int]:
    """Run the command line in this process, and return its exit status."""
    from tipl.cli import main

    def run(*arguments: object) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["tipl", *map(str, arguments)])
            try:
                main()
            except SystemExit as ending:
                return int(ending.code or 0)
        return 0

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks as small as a test's gain nothing from torch's threads, which on busy cores wait for each other."""
    from tipl.threads import torch_threads

    with torch_threads(1):
        yield


@pytest.fixture(scope="session")
def render_nothing() -> Callable[[pytest.MonkeyPatch], None]:
    """Let figures be drawn but not rendered, which takes most of a report's ten seconds: pictures are empty."""
    from matplotlib.figure import Figure
    from PIL import Image

    def savefig(figure: Figure, file: io.IOBase, *, format: str, **_: Any) -> None:
        if format == "png":
            Image.new("RGB", (1, 1)).save(file, "png")
        else:
            file.write("<svg></svg>" if isinstance(file, io.TextIOBase) else b"<svg></svg>")

    return lambda patch: patch.setattr(Figure, "savefig", savefig)


@pytest.fixture
def unrendered(render_nothing: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn but not rendered."""
    render_nothing(monkeypatch)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> "Store":
    """Six trials of 16 checkpoints, of which TINY_TRAIN holds out one; to be read alone."""
    from factories import make_store

    return make_store(tmp_path_factory.mktemp("tiny") / "store.zarr", 6, 16)


@pytest.fixture(scope="session")
def tiny_model(tiny_store: "Store") -> Path:
    """The folder of a model that TINY_TRAIN has trained on `tiny_store`; to be read alone."""
    from factories import TINY_TRAIN

    from tipl.forecasting.training import train

    return train(tiny_store, tiny_store.path.with_name("model"), TINY_TRAIN, progress=False)


@pytest.fixture(scope="module")
def hasty_nowcaster() -> Iterator[None]:
    """Let the weight nowcaster learn for few steps: its 400 take most of a tiny evaluation's seconds."""
    import tipl.judging.nowcaster

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tipl.judging.nowcaster, "STEPS", 4)
        yield


@pytest.fixture(scope="session")
def forget_connections() -> Callable[[], None]:
    """Let go of s3fs's sessions, which it leaves to the garbage collector, now."""
    import fsspec

    def forget() -> None:
        type(fsspec.filesystem("s3")).clear_instance_cache()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect()

    return forget


@pytest.fixture(scope="module")
def bucket(forget_connections: Callable[[], None]) -> Iterator[str]:
    """The URL of an empty bucket on a server of the S3 protocol, where all of this process's s3:// URLs lead."""
    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    reset = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset).close()  # moto keeps buckets as long as the process lives
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "user")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.stop()
    forget_connections()


@pytest.fixture
def clean_device() -> Iterator[None]:
    """On the emulator: nothing was reported, and no memory is left on the device."""
    if cuda_devices.emulator is None:
        yield
        return
    live_bytes = cuda_devices.emulator.ptxrunLiveBytes
    if live_bytes() > 0:  # garbage of the test before
        gc.collect()
    before = live_bytes()
    yield
    message = cuda_devices.emulator.ptxrunLastMessage().decode()
    cuda_devices.emulator.ptxrunClearError()
    if live_bytes() != before:  # collecting takes longer than most tests
        gc.collect()
    assert not message, message
    assert live_bytes() == before, "memory is left on the device"


@pytest.fixture
def no_faults() -> Iterator[None]:
    """After the test no call of CUDA fails any more on the emulator."""
    yield
    cuda_devices.emulator.ptxrunFail(None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Hub]":
    """The state of a server of the Hugging Face hub, which huggingface_hub asks in this test, with a user's token."""
    from hub_server import TOKEN, Server
    from huggingface_hub import HfFileSystem, constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    home = tmp_path_factory.mktemp("hub-home")
    with Server() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_DISABLE_XET": True,  # which speaks to another server
            "HF_HUB_CACHE": str(home),
            "HF_TOKEN_PATH": str(home / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield server.hub
    HfFileSystem.clear_instance_cache()
