"""Servers that refuse access: one line says so and what to do, and what is open beside it can be read."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from factories import make_store

import tipl
from tipl.files.hub_errors import Unreachable
from tipl.storing.store import Store

# Warnings of aiohttp.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


class Handler(SimpleHTTPRequestHandler):
    """Serves the files of a folder but no listings of it, as most web servers do, or refuses everything."""

    server: "Server"

    def log_message(self, *_: object) -> None:
        pass

    def list_directory(self, path: object) -> None:
        self.send_error(403)

    def do_GET(self) -> None:
        self._refused() or super().do_GET()

    def do_HEAD(self) -> None:
        self._refused() or super().do_HEAD()

    def _refused(self) -> bool:
        if self.server.status is not None:
            self.send_error(self.server.status)
        return self.server.status is not None


class Server(ThreadingHTTPServer):
    """The server, and with which status it refuses everything."""

    daemon_threads = True
    status: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def one_line(run_tipl: Callable[..., int], capsys: pytest.CaptureFixture[str], url: str) -> str:
    """Return what `tipl verify` says of a URL."""
    assert run_tipl("verify", url) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tipl: error: {url}/")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(("status", "reason"), [(401, "Unauthorized"), (403, "Forbidden")])
def test_https(
    status: int, reason: str, server: Server, run_tipl: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    server.status = status
    said = (
        rf"/store/z.*\.json: access was refused \({status}, {reason}\): check the address; where it asks for a login, "
    )
    for read in (Store.open, tipl.load_zoo, tipl.verify):
        with pytest.raises(Unreachable, match=said):
            read(f"{server.url}/store")
    assert "access was refused" in one_line(run_tipl, capsys, f"{server.url}/store")
    server.status = 404
    with pytest.raises(FileNotFoundError, match="there is no trajectory store at http"):
        Store.open(f"{server.url}/store")


def test_a_web_server_that_lists_no_folders_is_read(server: Server, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", 2, 4)
    store.close()
    there = Store.open(f"{server.url}/store")
    np.testing.assert_array_equal(there.trial(1).weights(), store.trial(1).weights())
    assert tipl.verify(f"{server.url}/store").problems == []


@pytest.mark.parametrize("has_login", [False, True])
def test_s3(
    has_login: bool,
    server: Server,
    forget_connections: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    server.status = 403
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "user") if has_login else monkeypatch.delenv(name, raising=False)
    forget_connections()
    answer = "Forbidden" if has_login else "Unable to locate credentials"
    with pytest.raises(
        Unreachable, match=rf"^s3://bucket/store: access was refused \({answer}\): set AWS_PROFILE, or AWS_"
    ):
        Store.open("s3://bucket/store")
    forget_connections()
