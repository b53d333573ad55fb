"""What goes wrong on the Hugging Face hub and on other servers, in one line each: their libraries say it in several."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


def check_installed(command: str) -> None:
    """Raise ValueError unless huggingface_hub is installed; `command` begins the text."""
    try:
        importlib.import_module("huggingface_hub")
    except ImportError:
        raise ValueError(f"{command}: the package huggingface_hub is not installed: pip install 'tipl[hub]'") from None


def check_token(who: str) -> None:
    """Raise ValueError, which begins with `who`, where the user's token holds what no HTTP header can."""
    from huggingface_hub import get_token

    token = get_token() or ""
    if not (token.isascii() and token.isprintable()):
        raise ValueError(
            f"{who}: the token for the Hugging Face hub (HF_TOKEN, or that of `hf auth login`) must hold printable "
            "ASCII characters alone, and holds others: copy it again"
        )


@contextlib.contextmanager
def hub_errors(command: str, repo_id: str, revision: str | None) -> Iterator[None]:
    """Raise what huggingface_hub raises as an error of one line, and hide its progress bars, for tipl has its own."""
    from httpx2 import HTTPError
    from huggingface_hub import constants, errors

    try:
        with _without_bars():
            yield
    except (
        HTTPError,
        errors.EntryNotFoundError,
        errors.HFValidationError,
        errors.OfflineModeIsEnabled,
        errors.XetDownloadError,
        RuntimeError,
    ) as error:
        found = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError | RuntimeError) else error
        who = f"{command}: {constants.ENDPOINT}"
        if isinstance(error, RuntimeError) and not isinstance(found, HTTPError):
            if "xet" not in str(error).lower():
                raise  # not of the hub
            raise OSError(f"{who}: {repo_id}: {line_of(error)}; HF_HUB_DISABLE_XET=1 goes without Xet") from error
        raise _in_one_line(found or error, who, repo_id, revision) from error


def _in_one_line(error: BaseException, who: str, repo_id: str, revision: str | None) -> Exception:
    """Return the exception of the standard library that says what an exception of huggingface_hub means."""
    from httpx2 import HTTPError
    from huggingface_hub import errors

    if isinstance(error, errors.RevisionNotFoundError):
        return ValueError(f"{who}: {repo_id} has no revision {revision}")
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(f"{who}: {repo_id} is gated: ask for access on its page")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(f"{who}: there is no {repo_id}, or it is private and the token does not open it")
    if isinstance(error, errors.HfHubHTTPError):
        status, said = _answer(error)
        return (PermissionError if status in (401, 403) else OSError)(f"{who}: {repo_id}: {status}, {said}")
    if isinstance(error, HTTPError | errors.OfflineModeIsEnabled):
        return ConnectionError(f"{who}: cannot be reached: {line_of(error)}")
    kind = ValueError if isinstance(error, ValueError) else OSError
    return kind(f"{who}: {repo_id}: {line_of(error)}")


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    utils = importlib.import_module("huggingface_hub.utils")  # whose types do not export these functions
    if utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _answer(error: "HfHubHTTPError") -> tuple[int, str]:
    """Return the status that a server answered, and what it said with it, in one line."""
    return error.response.status_code, line_of(error.server_message or error.response.reason_phrase)


def line_of(message: object) -> str:
    """Return what the hub or its library says, in one line."""
    return " ".join(str(message).split())


def read_error(error: Exception, url: str) -> Exception:
    """Return the exception that says, in one line with `url` and what to do, why a file there could not be read.

    FileNotFoundError where the file is not there, `Unreachable` where the server does not answer or refuses.
    """
    if not url.startswith("hf://"):
        return _unreachable(error, url)
    from httpx2 import HTTPError
    from huggingface_hub import errors

    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # its file system says no more than that nothing was found

    token = "`hf auth login` stores a token, or set HF_TOKEN"
    if isinstance(error, errors.EntryNotFoundError):
        return FileNotFoundError(f"{url} is not there")
    if isinstance(error, errors.GatedRepoError):
        return Unreachable(f"{url} is gated: ask for access on the repository's page; {token}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return Unreachable(f"{url}: there is no such repository, or the token does not open it: {token}")
    if isinstance(error, errors.HfHubHTTPError):
        status, said = _answer(error)
        return Unreachable(f"{url}: {status}, {said}; {token if status in (401, 403) else _AGAIN}")
    if isinstance(error, HTTPError):
        return Unreachable(f"{url}: the hub does not answer: {line_of(error) or type(error).__name__}; {_AGAIN}")
    if "xet" in str(error).lower():
        return Unreachable(f"{url}: {line_of(error)}; HF_HUB_DISABLE_XET=1 goes without Xet")
    return Unreachable(f"{url}: {line_of(error)}")


def means_absence(error: FileNotFoundError) -> bool:
    """Return whether a server said that there is nothing; otherwise it refused, or did not answer."""
    return error.__cause__ is None or _status(error.__cause__) in (404, 410)


def _status(error: BaseException) -> int | None:
    """Return the status with which a server answered, as aiohttp's and httpx's exceptions say it."""
    status = getattr(error, "status", getattr(getattr(error, "response", None), "status_code", None))
    return status if isinstance(status, int) else None


def _unreachable(error: Exception, url: str) -> "Unreachable":
    """Return what to say where a server other than the hub refuses, or does not answer."""
    found = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    status, said = _status(found), line_of(getattr(found, "message", found))
    is_refused = isinstance(found, PermissionError) or type(found).__name__ == "NoCredentialsError"
    if status not in (401, 403) and not is_refused:
        return Unreachable(f"{url}: {said}" if status is None else f"{url}: {status}, {said}")
    answer = said if status is None else f"{status}, {said}"
    scheme = url.partition("://")[0]
    return Unreachable(f"{url}: access was refused ({answer}): {_ACCESS.get(scheme, _ASK)}")


_ASK = "log in to that server, or ask its owner for access"
_WEB = "check the address; where it asks for a login, download all of it and give the folder"
_S3 = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, to a login that may use this bucket"
_ACCESS = {"s3": _S3, "https": _WEB, "http": _WEB}
_AGAIN = "try again, or copy all of it first with `tipl pull`"


class Unreachable(ConnectionError):
    """The server behind a URL does not answer, or refuses: nothing is known of what lies there."""
