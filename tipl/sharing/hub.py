"""Stores, zoos and model folders in repositories of the Hugging Face hub, by its own library, huggingface_hub.

A store or a zoo goes into a dataset repository, a model folder into a model repository: its files at the root, beside a
card, README.md, that is written from them. A push is one commit, so that nobody ever sees half of one. A pull checks
what arrived before it appears under its name.
"""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tipl.collecting.settings import refuse_unfinished
from tipl.files.hub_errors import check_installed, check_token, hub_errors, line_of
from tipl.files.locations import local_path, naming
from tipl.files.publishing import published, remove
from tipl.progress import progress_bar
from tipl.sharing.cards import CARD, card_of
from tipl.sharing.kinds import KINDS, Kind, RepoType, kind_among
from tipl.storing.store import Store
from tipl.storing.store_files import files_in
from tipl.verification import verify

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

BAR_SECONDS = 2.0  # transfers that take longer show a bar
DOWNLOADS = 8  # at a time
UPLOAD_FILES = 64  # files uploaded together
MAIN = "main"
ATTRIBUTES = ".gitattributes"  # which the hub makes in every repository


def push(
    path: str | Path,
    repo_id: str,
    *,
    license: str | None = None,
    private: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> str:
    """Check a store, a zoo or a model folder, commit it to a repository of the Hugging Face hub, and return its URL.

    The repository is made unless it exists: a dataset for a store or a zoo, a model for a model folder. Its README.md
    is written from the data. Only files that tipl wrote are pushed, not others in the folder. The token is the one that
    huggingface_hub finds: HF_TOKEN, or that of `hf auth login`. A push that was interrupted goes on when it is called
    again: the hub keeps what was uploaded.

    Args:
        path: The folder.
        repo_id: "user/name".
        license: An identifier that the hub knows, such as "mit" or "cc-by-4.0"; by default a zoo's own, else none.
        private: Make the repository private. An existing public one is refused.
        revision: A branch, which is made unless it exists; by default the main one.
        overwrite: Replace all that the branch holds. Its history keeps what was there.
        progress: Show how far it is on stderr.

    Raises FileNotFoundError where there is no `path`; ValueError where it is none of these, the collection is
    unfinished, there is no token or it cannot be one, the hub does not know the licence, or huggingface_hub is not
    installed; RuntimeError where a file is damaged; FileExistsError where the branch holds other files already; OSError
    where the hub cannot be reached or refuses.
    """
    check_installed("push")
    check_token("push")
    from huggingface_hub import HfApi, get_token

    _check_repo_id("push", repo_id)
    folder, api = local_path(path, "push: path"), HfApi(library_name="tipl")
    if not folder.exists():
        raise FileNotFoundError(f"push: there is no folder {path}")
    kind = kind_among([it.name for it in folder.iterdir()]) if folder.is_dir() else None
    if kind is None:
        raise ValueError(f"push: {path} must be the folder of a store, of a zoo or of a model with its manifest.json")
    if kind.name == "store":
        refuse_unfinished("push", Store.open(folder))
    if get_token() is None:
        raise ValueError(
            "push: there is no token for the Hugging Face hub: `hf auth login` stores one, or set HF_TOKEN"
        )
    _refuse_damage("push", folder, progress)
    card = card_of(kind, folder, repo_id, license)
    with naming(folder), hub_errors("push", repo_id, revision):
        _refuse_card(card, kind)
        url = api.create_repo(repo_id, private=private or None, repo_type=kind.repo_type, exist_ok=True)
        branch = _branch(api, repo_id, kind, revision, private=private)
        files: dict[str, bytes | Path] = {name: folder / name for name in kind.parts(folder, files_in(folder))}
        files[CARD] = card.encode()
        if _are_same(held := branch.held, files):
            return str(url)  # an earlier push had arrived whole
        if held and not overwrite:
            raise FileExistsError(
                f"push: {repo_id} holds {len(held)} other files already ({min(held)}, ...): choose another repository "
                "or revision, or overwrite them (--overwrite); the history keeps them"
            )
        return _commit(api, repo_id, kind, revision, branch, files, progress)


def pull(
    repo_id: str,
    output: str | Path,
    *,
    revision: str | None = None,
    repo_type: RepoType | None = None,
    progress: bool = True,
) -> Path:
    """Copy a store, a zoo or a model folder from a repository of the Hugging Face hub to `output`, and return that.

    Everything is checked against its checksums before `output` appears, whole or not at all. Other files of the
    repository are left out.

    Args:
        repo_id: "user/name".
        output: The new folder.
        revision: A branch, a tag or a commit; by default the head of the main branch.
        repo_type: "dataset" or "model"; needed only where the hub has both under this name.
        progress: Show how far it is on stderr.

    Raises FileExistsError where `output` exists; FileNotFoundError where there is no such repository, or the token may
    not read it; ValueError where the repository holds none of these, there is no such revision, or huggingface_hub is
    not installed; RuntimeError where a file is damaged; OSError where the hub cannot be reached or refuses.
    """
    check_installed("pull")
    check_token("pull")
    from huggingface_hub import HfApi

    _check_repo_id("pull", repo_id)
    output, api = local_path(output, "pull: output"), HfApi(library_name="tipl")
    with naming(output), published(output, "pull", manifest=False) as aside:
        with hub_errors("pull", repo_id, revision):
            repo_type, commit = _found(api, repo_id, repo_type, revision)
            sizes = {name: it.size for name, it in _files(api, repo_id, repo_type, commit).items()}
            kind = kind_among(sizes)
            if kind is None or kind.repo_type != repo_type:
                raise ValueError(f"pull: the {repo_type} repository {repo_id} holds no store, zoo or model of tipl")

            def download(name: str) -> int:
                api.hf_hub_download(repo_id, name, repo_type=repo_type, revision=commit, local_dir=aside)
                return sizes[name]

            download(kind.index)
            here = {kind.index}
            while names := _missing(kind, aside, repo_id, sizes, here):  # what came before names what comes next
                pool = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="tipl-pull")
                try:
                    _show("pull", sum(sizes[name] for name in names), pool.map(download, names), progress)
                finally:
                    pool.shutdown(cancel_futures=True)  # after Ctrl-C, those that have not begun never will
                here.update(names)
        remove(aside / ".cache")  # huggingface_hub's notes on what it loaded
        with _named(aside, repo_id):
            _refuse_damage("pull", aside, progress, f"what arrived of {repo_id} for {output}")
        for name in files_in(aside):
            with open(aside / name, "rb") as file:
                os.fsync(file.fileno())  # before the folder gets its name
    return output


def _missing(kind: Kind, folder: Path, repo_id: str, names: Collection[str], here: set[str]) -> list[str]:
    """Return those of `names` that belong to `folder`, as far as that is known, and are not among those `here`."""
    with _named(folder, repo_id):
        return [name for name in kind.parts(folder, names) if name not in here]


def _check_repo_id(command: str, repo_id: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, re.ASCII):
        raise ValueError(f"{command}: repo_id must be user/name, got {repo_id!r:.80}")


def _refuse_damage(command: str, folder: Path, progress: bool, name: str | None = None) -> None:
    """Raise RuntimeError where a file in `folder`, which the message calls `name`, is damaged."""
    problems = verify(folder, progress=progress).problems
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RuntimeError(f"{command}: {name or folder} is damaged: {problems[0]}{more}")


@contextlib.contextmanager
def _named(folder: Path, name: str) -> Iterator[None]:
    """Say `name` in place of `folder`, which is temporary, in the text of a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(str(error).replace(str(folder), name)) from error


def _found(api: "HfApi", repo_id: str, repo_type: RepoType | None, revision: str | None) -> tuple[RepoType, str]:
    """Return the type of the repository and its commit at `revision`."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    found: dict[RepoType, str] = {}
    missing = []
    for kind in dict.fromkeys(kind.repo_type for kind in KINDS) if repo_type is None else [repo_type]:
        try:
            found[kind] = str(api.repo_info(repo_id, repo_type=kind, revision=revision).sha)
        except RepositoryNotFoundError as error:
            missing.append(error)
    if len(found) > 1:
        raise ValueError(f"pull: the hub has a dataset and a model {repo_id}: say which with repo_type (--repo-type)")
    if not found:
        raise max(missing, key=lambda error: isinstance(error, GatedRepoError))
    return next(iter(found.items()))


class _Branch(NamedTuple):
    """A branch to push to."""

    head: str
    """Its newest commit."""
    files: "dict[str, RepoFile]"
    is_copy: bool
    """Whether it is a copy of the main branch, without a commit of its own."""

    @property
    def held(self) -> "dict[str, RepoFile]":
        """The files that a push must not replace unasked."""
        return {} if self.is_copy else {name: file for name, file in self.files.items() if name != ATTRIBUTES}


def _branch(api: "HfApi", repo_id: str, kind: Kind, revision: str | None, *, private: bool) -> _Branch:
    """Return the branch to push to, which is made unless it exists."""
    from huggingface_hub.errors import RevisionNotFoundError

    info = api.repo_info(repo_id, repo_type=kind.repo_type)
    if private and not info.private:
        raise FileExistsError(
            f"push: {repo_id} exists already and is public; its settings on the hub can make it private"
        )
    main, is_other = info.sha, revision not in (None, MAIN)
    if is_other:
        try:
            info = api.repo_info(repo_id, repo_type=kind.repo_type, revision=revision)
        except RevisionNotFoundError:
            api.create_branch(repo_id, branch=str(revision), repo_type=kind.repo_type)
            info = api.repo_info(repo_id, repo_type=kind.repo_type, revision=revision)
    files = _files(api, repo_id, kind.repo_type, str(info.sha))
    return _Branch(str(info.sha), files, is_copy=is_other and info.sha == main)


def _files(api: "HfApi", repo_id: str, repo_type: RepoType, revision: str) -> "dict[str, RepoFile]":
    """Return name -> what the hub says of it for all files in a repository."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=repo_type)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _are_same(held: "dict[str, RepoFile]", files: dict[str, bytes | Path]) -> bool:
    """Return whether a branch holds just these files (name -> contents, or where they are)."""
    if held.keys() != files.keys():
        return False
    for name, file in files.items():
        data, there = file if isinstance(file, bytes) else file.read_bytes(), held[name]
        if there.lfs is None:
            same = there.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # as git names contents
        else:
            same = there.lfs.sha256 == hashlib.sha256(data).hexdigest()
        if not same:
            return False
    return True


def _refuse_card(card: str, kind: Kind) -> None:
    """Raise ValueError where the hub refuses the card's head, such as a licence that it does not know."""
    from huggingface_hub import RepoCard

    try:
        RepoCard(card).validate(kind.repo_type)
    except ValueError as error:
        said = getattr(error.__context__, "server_message", None) or str(error)
        raise ValueError(f"push: the hub refuses the card: {line_of(said)}") from error


def _commit(
    api: "HfApi",
    repo_id: str,
    kind: Kind,
    revision: str | None,
    branch: _Branch,
    files: dict[str, bytes | Path],
    progress: bool,
) -> str:
    """Make `files` (name -> contents, or where they are) all that the branch holds, in one commit; return the URL."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    where: dict[str, Any] = {"repo_id": repo_id, "repo_type": kind.repo_type, "revision": revision}
    additions = [CommitOperationAdd(name, data) for name, data in files.items()]
    _show("push", sum(it.upload_info.size for it in additions), _uploads(api, additions, where), progress)
    gone = [CommitOperationDelete(name) for name in sorted(branch.files.keys() - files.keys() - {ATTRIBUTES})]
    commit = api.create_commit(
        operations=[*gone, *additions],
        commit_message=f"Push a {kind.name} with tipl",
        parent_commit=branch.head,
        **where,
    )
    return str(commit.repo_url)


def _uploads(api: "HfApi", additions: "list[CommitOperationAdd]", where: dict[str, Any]) -> Iterator[int]:
    """Upload files for a commit, some at a time, and yield their bytes, whatever the repository's .gitignore says."""
    for start in range(0, len(additions), UPLOAD_FILES):
        batch = additions[start : start + UPLOAD_FILES]
        api.preupload_lfs_files(additions=batch, free_memory=False, gitignore_content="# nothing\n", **where)
        yield sum(addition.upload_info.size for addition in batch)


def _show(command: str, num_bytes: int, done: Iterable[int], progress: bool) -> None:
    """Go through the bytes of parts that are transferred, and show the megabytes where that takes long."""
    started, bar = time.monotonic(), progress_bar(progress)
    task = bar.add_task(f"{command}, MB", total=num_bytes / 1e6, note="")
    with contextlib.ExitStack() as stack:
        for part in done:
            bar.advance(task, part / 1e6)
            if not bar.live.is_started and time.monotonic() - started > BAR_SECONDS:
                stack.enter_context(bar)
