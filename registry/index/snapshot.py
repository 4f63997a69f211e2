"""Snapshots of the index on disk: whole or not there.

A folder with one manifest and, for each shard, a data file and perhaps a graph. The files carry
new names each time and the manifest is replaced last, in one step, so that a crash at any moment
leaves the earlier snapshot. The manifest names the size and digest of every file; nothing is taken
from a snapshot before all of that holds.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from capability_schemas.errors import ConfigurationError
from registry.index.attributes import NOBODY, AttributeSets
from registry.index.base import ROOM, Rows
from registry.index.rows import VectorRows

if TYPE_CHECKING:
    from registry.index.hnsw import Graph

FORMAT: Final = "foam.index"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
_CHUNK_BYTES: Final = 1 << 20
_STRINGS_AT_ONCE: Final = 1_000
_ROWS_AT_ONCE: Final = 1_024


@dataclass(frozen=True, slots=True)
class ShardState:
    """What a snapshot keeps of a shard; nothing in it changes while it is written.

    Attributes:
        vectors: by row.
        keys: by row; None where nothing lives.
        numbers: of the attribute sets, by row; ``NOBODY`` where nothing lives.
        graph: None where all are compared.
        held: rows in the graph, ascending.
        buried: of these, the dead ones that the graph knows to be dead.
    """

    vectors: VectorRows
    keys: list[str | None]
    numbers: npt.NDArray[np.int32]
    graph: "Graph | None"
    held: Rows
    buried: frozenset[int]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoredFile(_Part):
    """A file of a snapshot.

    Attributes:
        name: in the folder.
        size_bytes: its length.
        digest: hex blake2b (RFC 7693) of 32 bytes.
    """

    name: Annotated[str, Field(pattern=r"^[0-9a-f]+-[0-9]+\.(data|graph)$")]
    size_bytes: int
    digest: str


class StoredShard(_Part):
    """A shard in a snapshot.

    Attributes:
        domain: its trust domain.
        top: rows, the empty ones among them.
        live: rows with a key.
        held: rows in the graph.
        buried: of these, the dead ones that the graph knows to be dead.
        data: rows, numbers, held and buried rows as int64, vectors as float32, keys and attribute
            sets as lines of JSON, an empty line after each of these.
        graph: None where all are compared.
    """

    domain: str
    top: Annotated[int, Field(ge=0)]
    live: Annotated[int, Field(ge=0)]
    held: Annotated[int, Field(ge=0)]
    buried: Annotated[int, Field(ge=0)]
    data: StoredFile
    graph: StoredFile | None


class Manifest(_Part):
    """What a snapshot says of itself."""

    format: Literal["foam.index"] = FORMAT
    version: Literal[1] = VERSION
    dimension: int
    space: str
    shards: tuple[StoredShard, ...]


def write_snapshot(
    folder: Path,
    states: Mapping[str, ShardState],
    sets: Sequence[frozenset[str]],
    *,
    dimension: int,
    space: str,
) -> None:
    """Write a snapshot in place of an earlier one.

    Args:
        folder: made when missing.
        states: by domain; nobody changes them meanwhile.
        sets: attribute sets by number.
        dimension: length of every vector.
        space: identity of the vector space.

    Raises:
        ConfigurationError: the folder cannot be written; an earlier snapshot still stands then.
    """
    batch = secrets.token_hex(8)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shards = tuple(
            _write_shard(folder, f"{batch}-{at}", domain, state, sets)
            for at, (domain, state) in enumerate(states.items())
        )
        manifest = Manifest(dimension=dimension, space=space, shards=shards)
        fresh = folder / f"{MANIFEST}.new"
        with fresh.open("wb") as file:
            file.write(manifest.model_dump_json(indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(folder / MANIFEST)
        _sync_folder(folder)
    except (OSError, RuntimeError) as exc:
        _sweep(folder, lambda name: name.startswith(batch))
        raise ConfigurationError(f"cannot write the index snapshot in {folder}: {exc}") from exc
    _sweep(folder, lambda name: not name.startswith(batch))


def read_snapshot(
    folder: Path,
    sets: AttributeSets,
    graphs: "type[Graph] | None",
    *,
    dimension: int,
    space: str,
) -> dict[str, ShardState]:
    """Read a snapshot.

    Args:
        folder: as ``write_snapshot`` filled it.
        sets: takes the attribute sets, each with no user yet.
        graphs: the class of graphs; None has everything compared.
        dimension: must be that of the snapshot.
        space: must be that of the snapshot.

    Returns:
        By domain; their numbers are those of ``sets``.

    Raises:
        ConfigurationError: no snapshot, a torn or foreign one, or one of another space or version.
    """
    manifest = _read_manifest(folder)
    if (manifest.dimension, manifest.space) != (dimension, space):
        raise ConfigurationError(
            f"the index snapshot in {folder} is of the vector space {manifest.space!r} with "
            f"{manifest.dimension} dimensions, not {space!r} with {dimension}: vectors of "
            "different spaces are never compared; delete it, the catalogue rebuilds the index"
        )
    try:
        for shard in manifest.shards:
            for stored in (shard.data, shard.graph):
                if stored is not None:
                    _check(folder, stored)
        return {
            shard.domain: _read_shard(folder, shard, sets, graphs, dimension)
            for shard in manifest.shards
        }
    except (OSError, ValueError, RuntimeError, LookupError, TypeError) as exc:
        raise _torn(folder, str(exc)) from exc


def _write_shard(
    folder: Path, stem: str, domain: str, state: ShardState, sets: Sequence[frozenset[str]]
) -> StoredShard:
    rows = np.flatnonzero(state.numbers)
    used, numbers = np.unique(state.numbers[rows], return_inverse=True)
    buried = np.sort(np.fromiter(state.buried, dtype=np.int64, count=len(state.buried)))
    keys = [state.keys[row] for row in rows.tolist()]
    chosen = [sorted(sets[number]) for number in used.tolist()]
    path = folder / f"{stem}.data"
    with path.open("wb") as file:
        for array in (rows, numbers, state.held, buried):
            np.ascontiguousarray(array, dtype="<i8").tofile(file)
        for at in range(0, len(rows), _ROWS_AT_ONCE):
            vectors = state.vectors.gather(rows[at : at + _ROWS_AT_ONCE])
            np.ascontiguousarray(vectors, dtype="<f4").tofile(file)
        for items in (keys, chosen):
            # A line for some thousand: one call that holds the interpreter lock for long would
            # hold up the event loop too.
            for at in range(0, len(items), _STRINGS_AT_ONCE):
                file.write(json.dumps(items[at : at + _STRINGS_AT_ONCE]).encode() + b"\n")
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())
    graph = None
    if state.graph is not None:
        state.graph.save(folder / f"{stem}.graph")
        graph = _describe(folder / f"{stem}.graph", sync=True)
    return StoredShard(
        domain=domain,
        top=len(state.keys),
        live=len(rows),
        held=len(state.held),
        buried=len(buried),
        data=_describe(path),
        graph=graph,
    )


def _read_shard(
    folder: Path,
    shard: StoredShard,
    sets: AttributeSets,
    graphs: "type[Graph] | None",
    dimension: int,
) -> ShardState:
    with (folder / shard.data.name).open("rb") as file:
        rows, numbers, held, buried = (
            _read_array(file, "<i8", count).astype(np.intp)
            for count in (shard.live, shard.live, shard.held, shard.buried)
        )
        vectors = VectorRows(dimension)
        for at in range(0, shard.live, _ROWS_AT_ONCE):
            some = rows[at : at + _ROWS_AT_ONCE]
            vectors.fill(
                some, _read_array(file, "<f4", len(some) * dimension).reshape(-1, dimension)
            )
        lines = file.read().decode().split("\n")
    gap = lines.index("")
    keys: list[str] = [key for line in lines[:gap] for key in json.loads(line)]
    chosen = [frozenset(found) for line in lines[gap + 1 :] if line for found in json.loads(line)]
    if len(keys) != shard.live or len(set(keys)) != shard.live:
        raise ValueError(f"{len(keys)} keys stand for {shard.live} vectors")
    by_row: list[str | None] = [None] * shard.top
    for row, key in zip(rows.tolist(), keys, strict=True):
        by_row[row] = key
    known = np.array([sets.number(attributes) for attributes in chosen], dtype=np.int32)
    by_number = np.full(shard.top, NOBODY, dtype=np.int32)
    by_number[rows] = known[numbers] if len(rows) else 0
    graph = None
    if shard.graph is not None and graphs is not None:
        graph = graphs(
            dimension=dimension,
            capacity=ROOM * shard.held,
            stored=folder / shard.graph.name,
            buried=buried.tolist(),
        )
        if len(graph) != shard.held:
            raise ValueError(f"the graph holds {len(graph)} vectors, not {shard.held}")
    return ShardState(
        vectors=vectors,
        keys=by_row,
        numbers=by_number,
        graph=graph,
        held=held if graph is not None else held[:0],
        buried=frozenset(buried.tolist()),
    )


def _read_array(file: Any, dtype: str, count: int) -> npt.NDArray[Any]:
    found = np.fromfile(file, dtype=dtype, count=count)
    if len(found) != count:
        raise ValueError(f"{count} numbers expected, {len(found)} found")
    return found


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError as exc:
        raise ConfigurationError(f"no index snapshot in {folder}") from exc
    except OSError as exc:
        raise ConfigurationError(f"cannot read the index snapshot in {folder}: {exc}") from exc
    try:
        claimed = json.loads(raw)
        told = (claimed["format"], claimed["version"])
    except (ValueError, LookupError, TypeError) as exc:
        raise _torn(folder, f"{MANIFEST} is not readable") from exc
    if told != (FORMAT, VERSION):
        raise ConfigurationError(
            f"the index snapshot in {folder} is of format {told[0]!r} version {told[1]!r}, not "
            f"{FORMAT!r} version {VERSION}: delete it, the catalogue rebuilds the index"
        )
    try:
        return Manifest.model_validate(claimed)
    except ValidationError as exc:
        raise _torn(folder, f"{MANIFEST} is incomplete") from exc


def _describe(path: Path, *, sync: bool = False) -> StoredFile:
    if sync:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return StoredFile(name=path.name, size_bytes=path.stat().st_size, digest=_digest(path))


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _check(folder: Path, stored: StoredFile) -> None:
    path = folder / stored.name
    size = path.stat().st_size
    if size != stored.size_bytes:
        raise ValueError(f"{stored.name} has {size} bytes, not {stored.size_bytes}")
    if _digest(path) != stored.digest:
        raise ValueError(f"{stored.name} is not what was written")


def _torn(folder: Path, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"the index snapshot in {folder} is torn: {why}; "
        "delete it, the catalogue rebuilds the index"
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(folder: Path, doomed: Callable[[str], bool]) -> None:
    """Delete files of snapshots; what cannot be deleted is left for the next time."""
    for path in folder.glob("*-*.*"):
        if path.suffix in {".data", ".graph"} and doomed(path.name):
            with contextlib.suppress(OSError):
                path.unlink()
