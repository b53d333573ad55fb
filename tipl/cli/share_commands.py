"""Commands that share stores and models with others."""

import dataclasses
from typing import Literal

import tyro

import tipl
from tipl.cli.arguments import PathArg, StoreArg


@dataclasses.dataclass(frozen=True)
class Push:
    """Put a store, a model or a zoo into a repository of the Hugging Face hub, with a card written from the data.

    Everything is checked first. The token is HF_TOKEN, or that of `hf auth login`. It needs the extra `hub`
    (pip install 'tipl[hub]').

    Example: tipl push runs/cheetah/store.zarr user/cheetah-runs --license mit
    """

    path: tyro.conf.Positional[PathArg]
    """The folder of a store, a model or a zoo."""
    repo_id: tyro.conf.Positional[str]
    """The repository, user/name. It is made unless it exists: a dataset for a store or a zoo, a model for a model."""
    license: str | None = None
    """An identifier that the hub knows, such as mit or cc-by-4.0; by default a zoo's own, else none."""
    private: bool = False
    """Make the repository private."""
    revision: str | None = None
    """A branch, which is made unless it exists; by default the main one."""
    overwrite: bool = False
    """Replace what the branch holds; its history keeps the old files."""

    def run(self) -> None:
        url = tipl.push(
            self.path,
            self.repo_id,
            license=self.license,
            private=self.private,
            revision=self.revision,
            overwrite=self.overwrite,
        )
        print(f"pushed     {url}")


@dataclasses.dataclass(frozen=True)
class Pull:
    """Get a store, a model or a zoo from a repository of the Hugging Face hub, and check it.

    It needs the extra `hub` (pip install 'tipl[hub]').

    Example: tipl pull user/cheetah-runs --output runs/cheetah.zarr
    """

    repo_id: tyro.conf.Positional[str]
    """The repository, user/name."""
    output: PathArg
    """Where it goes; must not exist."""
    revision: str | None = None
    """A branch, a tag or a commit; by default the newest commit of the main branch."""
    repo_type: Literal["dataset", "model"] | None = None
    """Needed only where the hub has both a dataset and a model of this name."""

    def run(self) -> None:
        print(f"pulled     {tipl.pull(self.repo_id, self.output, revision=self.revision, repo_type=self.repo_type)}")


@dataclasses.dataclass(frozen=True)
class MakeZoo:
    """Make a zoo: one folder with copies of stores, of one task or several, and an index with their checksums.

    Python opens it with tipl.load_zoo, from a folder, from s3:// or, once pushed, from hf://datasets/user/name.

    Example: tipl zoo runs/hopper.zarr runs/reacher.zarr --license mit --output runs/zoo
    """

    stores: tyro.conf.Positional[tuple[StoreArg, ...]]
    """The folders or URLs of stores."""
    output: PathArg
    """The new folder; must not exist."""
    license: str | None = None
    """The licence of all of them, as an identifier such as mit or cc-by-4.0."""

    def run(self) -> None:
        zoo = tipl.load_zoo(tipl.make_zoo(self.stores, self.output, license=self.license))
        print(f"zoo        {self.output}")
        for task, entries in zoo.tasks.items():
            for entry in entries:
                counts = f"{entry.num_trials} trials x {entry.num_checkpoints} checkpoints"
                print(f"store      {entry.path}: {task}, {counts}")
