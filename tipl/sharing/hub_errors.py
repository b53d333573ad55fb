"""What goes wrong on the Hugging Face hub, in one line each: huggingface_hub says it in several."""

import contextlib
from collections.abc import Iterator
from types import ModuleType


def hub_library(command: str) -> ModuleType:
    """Return huggingface_hub. Raises ValueError where it is not installed."""
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(f"{command}: the package huggingface_hub is not installed: pip install 'tipl[hub]'") from None
    return huggingface_hub


@contextlib.contextmanager
def hub_errors(command: str, repo_id: str, revision: str | None) -> Iterator[None]:
    """Raise what huggingface_hub raises as an error of one line, and hide its progress bars, for tipl has its own."""
    hub = hub_library(command)
    errors = hub.errors
    try:
        with _without_bars(hub):
            yield
    except (
        errors.HTTPError,
        errors.EntryNotFoundError,
        errors.HFValidationError,
        errors.OfflineModeIsEnabled,
        errors.XetDownloadError,
        RuntimeError,
    ) as error:
        found = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError | RuntimeError) else error
        if isinstance(error, RuntimeError) and not isinstance(found, errors.HTTPError):
            raise  # not of the hub
        who = f"{command}: {hub.constants.ENDPOINT}"
        raise _in_one_line(found or error, errors, who, repo_id, revision) from error


def _in_one_line(error: BaseException, errors: ModuleType, who: str, repo_id: str, revision: str | None) -> Exception:
    """Return the exception of the standard library that says what an exception of huggingface_hub means."""
    if isinstance(error, errors.RevisionNotFoundError):
        return ValueError(f"{who}: {repo_id} has no revision {revision}")
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(f"{who}: {repo_id} is gated: ask for access on its page")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(f"{who}: there is no {repo_id}, or it is private and the token does not open it")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        said = _line(error.server_message or error.response.reason_phrase)
        return (PermissionError if status in (401, 403) else OSError)(f"{who}: {repo_id}: {status}, {said}")
    if isinstance(error, errors.HTTPError | errors.OfflineModeIsEnabled):
        return ConnectionError(f"{who}: cannot be reached: {_line(error)}")
    kind = ValueError if isinstance(error, ValueError) else OSError
    return kind(f"{who}: {repo_id}: {_line(error)}")


@contextlib.contextmanager
def _without_bars(hub: ModuleType) -> Iterator[None]:
    if hub.utils.are_progress_bars_disabled():
        yield
        return
    hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        hub.utils.enable_progress_bars()


def _line(message: object) -> str:
    return " ".join(str(message).split())
