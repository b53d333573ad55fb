"""The attributes of a store's groups: the root's record of what was run, and the trials' commit records.

    zarr.json               what was run: env_id, env_kwargs (where there are any), policy, seeds, config; and
                            chunk_rows, the rows per chunk of `weights`
    trial_0000/zarr.json    trial, seed, num_checkpoints = T
                            store: the digest of the root's attributes
                            chunks: array -> base64 of one little-endian uint32 per chunk, the crc32c of its committed
                            rows

For a full chunk this equals the checksum that Zarr's codec stores after it. For the last chunk it covers only committed
rows, because a killed writer may have written more. So a trial from another store, or a chunk from another trial, place
or time, is detected, even if it is intact in itself. Stores with equal settings have equal digests, so that equal runs
give equal bytes.
"""

import base64
import binascii
import warnings
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from tipl.files.locations import Location
from tipl.files.schema import parse
from tipl.files.sealed import UncheckedWarning, json_digest
from tipl.policy import Layout, layout_from_dict
from tipl.storing.zarr_files import MAX_ROWS, ZarrArray, read_group, write_group

FORMAT, VERSION = "tipl-store", 1
SCALAR_CHUNK_ROWS = 1024  # rows per chunk of env_steps and episodic_return: 8 KiB
MAX_CHUNK_BYTES = 2**30  # largest chunk with more than one row
MAX_PARAMS = 2**31
DIGEST_LETTERS = 16

Arrays = tuple[ZarrArray, ZarrArray, ZarrArray]  # weights, env_steps, episodic_return


class UncheckedStoreWarning(UncheckedWarning):
    """An older tipl wrote the store, whose commit records have no checksums of the chunks."""

    def __init__(self, path: Location) -> None:
        message = "an older tipl wrote it, without a record of its chunks: those of another run cannot be found"
        UserWarning.__init__(self, f"store {path}: {message}")


@dataclass(frozen=True)
class StoreRecord:
    """The attributes of a store's root."""

    format: Literal["tipl-store"]
    version: Literal[1]
    env_id: str
    policy: dict[str, Any]
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    config: dict[str, Any]
    chunk_rows: Annotated[int, Field(ge=1)]
    env_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            num_params = self.layout.num_params
        except (TypeError, ValueError, LookupError) as error:
            raise ValueError(f"policy must be a layout: {error}") from error
        if num_params > MAX_PARAMS:
            raise ValueError(f"policy must have at most {MAX_PARAMS:,} weights, got {num_params:,}")
        most = max(1, MAX_CHUNK_BYTES // (4 * num_params))
        if self.chunk_rows > most:
            raise ValueError(f"chunk_rows must be at most {most:,}, got {self.chunk_rows:,}")

    @property
    def layout(self) -> Layout:
        return layout_from_dict(self.policy)

    @property
    def arrays(self) -> Arrays:
        """The arrays of every trial."""
        return (
            ZarrArray("weights", "float32", "NaN", self.chunk_rows, (self.layout.num_params,)),
            ZarrArray("env_steps", "int64", -1, SCALAR_CHUNK_ROWS, ()),
            ZarrArray("episodic_return", "float64", "-Infinity", SCALAR_CHUNK_ROWS, ()),
        )


def read_store_record(path: Location) -> tuple[StoreRecord, str]:
    """Return the root's record of the store at `path`, and its digest. Raises RuntimeError where it is damaged."""
    attributes = read_group(path, f"store {path}")
    if attributes.get("format") != FORMAT:
        raise RuntimeError(f"store {path}: this Zarr group is no trajectory store of tipl")
    if attributes.get("version") != VERSION:
        version = attributes.get("version")
        raise RuntimeError(f"store {path}: has version {version!r:.80}, this tipl reads version {VERSION}")
    return parse(StoreRecord, attributes, path / "zarr.json"), store_digest(attributes)


def store_digest(attributes: dict[str, Any]) -> str:
    """Return the digest of the root's attributes, which trials and saved states contain to say where they belong."""
    return json_digest(attributes)[:DIGEST_LETTERS]


@dataclass(frozen=True)
class Commit:
    """The committed part of a trial: the number of rows, and the checksums of their chunks."""

    num_checkpoints: int
    checksums: dict[str, bytes] | None
    """Array -> one little-endian uint32 per chunk; None if an older tipl wrote the trial."""

    def of_chunk(self, array: ZarrArray, chunk: int) -> tuple[int, int] | None:
        """Return the number of committed rows of a chunk and their crc32c; None if that is not known."""
        if self.checksums is None:
            return None
        num_rows = min(array.chunk_rows, self.num_checkpoints - chunk * array.chunk_rows)
        return num_rows, int.from_bytes(self.checksums[array.name][4 * chunk : 4 * chunk + 4], "little")


@dataclass(frozen=True)
class _CommitRecord:
    """The attributes of a trial's group."""

    trial: int
    seed: int
    num_checkpoints: Annotated[int, Field(ge=0, le=MAX_ROWS)]
    store: str | None = None
    chunks: dict[str, str] | None = None


@dataclass(frozen=True)
class Trials:
    """The commit records of a store's trials: where they are, and what they have in common."""

    path: Location
    seeds: list[int]
    digest: str
    arrays: Arrays

    def __len__(self) -> int:
        return len(self.seeds)

    def folder(self, i: int) -> Location:
        return self.path / trial_name(i)

    def write_commit(self, i: int, commit: Commit) -> None:
        """Write the commit record of trial i."""
        assert commit.checksums is not None
        record = {"trial": i, "seed": self.seeds[i], "num_checkpoints": commit.num_checkpoints, "store": self.digest}
        chunks = {name: base64.b64encode(sums).decode() for name, sums in commit.checksums.items()}
        write_group(self.folder(i), record | {"chunks": chunks})

    def read_commit(self, i: int) -> Commit:
        """Return the commit record of trial i; warn where an older tipl wrote it.

        Raises RuntimeError where the record is damaged, or belongs to another trial or store.
        """
        folder = self.folder(i)
        record = parse(_CommitRecord, read_group(folder, f"trial {i}"), folder / "zarr.json")
        if (record.trial, record.seed) != (i, self.seeds[i]):
            of = f"its commit record is of trial {record.trial}, seed {record.seed}, not of seed {self.seeds[i]}"
            raise RuntimeError(f"trial {i}: {folder} is not trial {i} of this store: {of}")
        if record.store is None or record.chunks is None:
            self._warn_unchecked(i, record.num_checkpoints)
            return Commit(record.num_checkpoints, None)
        if record.store != self.digest:
            of = f"its commit record is of store {record.store!r:.20}, this one is {self.digest!r}"
            raise RuntimeError(f"trial {i}: {folder} is of another store: {of}")
        return Commit(record.num_checkpoints, self._checksums(folder / "zarr.json", record))

    def _warn_unchecked(self, i: int, num_checkpoints: int) -> None:
        """Warn that an older tipl wrote the trial. Raises RuntimeError where its committed chunks do not exist."""
        weights = self.arrays[0]
        last = num_checkpoints // weights.chunk_rows - 1  # the last full chunk
        if last >= 0 and not weights.has_chunk(self.folder(i) / weights.name, last):
            raise RuntimeError(f"trial {i}: {num_checkpoints} checkpoints are committed but not on disk")
        warnings.warn(UncheckedStoreWarning(self.path), stacklevel=1)

    def _checksums(self, path: Location, record: _CommitRecord) -> dict[str, bytes]:
        """Return a commit record's checksums, array -> one for each chunk with committed rows."""
        assert record.chunks is not None
        checksums = {}
        for array in self.arrays:
            try:
                sums = base64.b64decode(record.chunks.get(array.name, ""), validate=True)
            except (binascii.Error, ValueError) as error:
                raise RuntimeError(f"{path}: chunks.{array.name} must be base64: {error}") from error
            expected = array.num_chunks(record.num_checkpoints)
            if len(sums) != 4 * expected:
                raise RuntimeError(
                    f"{path}: chunks.{array.name} must be the checksums of {expected} chunks, for "
                    f"{record.num_checkpoints} checkpoints, got {len(sums)} bytes"
                )
            checksums[array.name] = sums
        return checksums


def trial_name(i: int) -> str:
    return f"trial_{i:04d}"
