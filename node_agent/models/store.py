"""The model store: one folder that every node of a user on this machine shares.

::

    models/
      blobs/sha256/<hex>        whole files, read only; their time stamp is when they were last used
      names/<name>.json         what a name stands for (`ModelRecord`)
      partial/<key>.partial     files on their way, with a .json beside them
      store.lock                held while names or blobs change

A file reaches ``blobs`` by a rename after its digest and its head were checked, so a half file is
never found there. Who uses a model holds a shared ``flock`` on its blob; the kernel drops it with
the process, so a model in use is never evicted and a dead process never keeps one.
"""

import contextlib
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Final, Self

import structlog
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from capability_schemas.errors import ConfigurationError, Conflict, NotFound, Unavailable
from capability_schemas.ids import now_ms
from node_agent.models import disk
from node_agent.models.gguf import BrokenModel, GgufInfo, read_gguf
from node_agent.models.reference import check_name

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_CHANGE_TIMEOUT_S: Final = 60.0
_HOLD_TIMEOUT_S: Final = 5.0
_PAUSE_S: Final = 0.01
_DIGEST: Final = re.compile(r"(?:sha256:)?(?P<digits>[0-9a-f]{6,64})")
_SPARE_BYTES: Final = 1 << 20
"""Disk space left for the store's own small files."""
_WEEK_S: Final = 7 * 24 * 3600.0


class ModelRecord(BaseModel):
    """What a name stands for.

    Attributes:
        name: The name.
        digest: SHA-256 of the file, hex.
        size_bytes: Its size.
        reference: Where it came from, without keys or passwords.
        source: Digest of the whole reference: tells whether a name is pulled again.
        etag: Validator that the server gave with it.
        modified: Date that the server gave with it.
        pinned: Whether it is kept whatever the disk budget says.
        added_at_ms: When it came.
        architecture: What its head says; None for a file that is no GGUF, like the three below.
        quantisation: Weight format.
        parameters: Number of weights.
        context_length: Tokens it was trained to see.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: Annotated[str, AfterValidator(check_name)]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size_bytes: int
    reference: str
    source: str
    etag: str | None = None
    modified: str | None = None
    pinned: bool = False
    added_at_ms: int
    architecture: str | None = None
    quantisation: str | None = None
    parameters: int | None = None
    context_length: int | None = None


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model in the store.

    Attributes:
        record: What is written about it.
        path: Its file.
        used_at_ms: When it was last resolved; 0 when its file is gone.
        in_use: Whether a process holds it now.
    """

    record: ModelRecord
    path: Path
    used_at_ms: int
    in_use: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a file comes from and what is to become of it.

    Attributes:
        name: Name wished for.
        reference: As shown to people.
        source: Digest of the whole reference.
        etag: Validator of the server.
        modified: Date of the server.
        pinned: Whether to keep it whatever the budget says.
        any_format: Whether a file that is no GGUF is welcome.
    """

    name: str
    reference: str
    source: str
    etag: str | None = None
    modified: str | None = None
    pinned: bool = False
    any_format: bool = False


class ModelStore:
    """Models on this machine, by name and by digest.

    Its leases are guarded by a lock, names and blobs by ``store.lock``: threads and processes may
    share a folder. Every call blocks, for milliseconds unless a file is hashed or copied.

    Args:
        folder: Where it lies; made when something is added.
        budget_bytes: Most bytes of models and of files on their way; None: no limit.
        keep_partial_s: Age at which an interrupted download is thrown away, seconds.
        clock: Now, UTC milliseconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        budget_bytes: int | None = None,
        keep_partial_s: float = _WEEK_S,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        self.folder = folder
        self.budget_bytes = budget_bytes
        self._keep_partial_s = keep_partial_s
        self._clock = clock
        self._blobs = folder / "blobs" / "sha256"
        self._names = folder / "names"
        self.partials = folder / "partial"
        self._guard = threading.Lock()
        self._leases: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of every model that was resolved."""
        with self._guard:
            while self._leases:
                os.close(self._leases.popitem()[1])

    def resolve(self, reference: str) -> Path:
        """Turn the model of a function into a file, and hold it until `release` or `close`.

        Args:
            reference: A path that exists (returned as it is), a name, a digest or its beginning,
                or the reference that was pulled.

        Raises:
            ConfigurationError: There is none, or it is damaged; says how to get it.
        """
        if _is_file(reference):
            path = Path(reference)
            if path.parent == self._blobs:
                self._hold(path, reference)
            return path
        record = self.find(reference)
        if record is None:
            raise ConfigurationError(self._nothing(reference), model=reference)
        path = self._blobs / record.digest
        self._hold(path, record.name)
        with contextlib.suppress(OSError):
            if path.stat().st_size != record.size_bytes:
                raise ConfigurationError(
                    f"model {record.name} is damaged: {path} has {path.stat().st_size} bytes "
                    f"instead of {record.size_bytes}; run `foam model remove {record.name}` and "
                    f"`foam model pull {record.reference}`"
                )
        return path

    def release(self, path: Path) -> None:
        """Let go of a file that `resolve` returned; other files are ignored."""
        with self._guard:
            descriptor = self._leases.pop(path.name, None) if path.parent == self._blobs else None
            if descriptor is not None:
                os.close(descriptor)

    def digest(self, path: Path) -> str | None:
        """Return ``sha256:`` and the digest of a stored file, without reading it; None for others.

        Args:
            path: What `resolve` returned.
        """
        return f"sha256:{path.name}" if path.parent == self._blobs else None

    def find(self, reference: str) -> ModelRecord | None:
        """Return what a name, a digest (six digits or more of it) or a pulled reference stands for.

        Raises:
            ConfigurationError: The digits fit several models.
        """
        records = self._records()
        if reference in records:
            return records[reference]
        if found := _DIGEST.fullmatch(reference):
            fits = [r for r in records.values() if r.digest.startswith(found["digits"])]
            if len({record.digest for record in fits}) > 1:
                raise ConfigurationError(
                    f"{reference} fits {', '.join(r.name for r in fits)}: give more digits"
                )
            if fits:
                return fits[0]
        return next((r for r in records.values() if r.reference == reference), None)

    def from_source(self, source: str) -> ModelRecord | None:
        """Return the latest model that came from a source (`source_key`).

        A file that is just being taken in counts: its partial is gone before its name is there.
        """
        with self._changing():
            found = [record for record in self._records().values() if record.source == source]
        return max(found, key=lambda record: record.added_at_ms, default=None)

    def list(self) -> tuple[StoredModel, ...]:
        """Return what is stored, the last used first."""
        models = [self._stored(record) for record in self._records().values()]
        return tuple(sorted(models, key=lambda model: -model.used_at_ms))

    def show(self, reference: str) -> StoredModel:
        """Return one model.

        Raises:
            NotFound: There is none.
        """
        return self._stored(self._must_find(reference))

    def remove(self, reference: str, *, force: bool = False) -> StoredModel:
        """Forget a name, and delete its file when no other name stands for it.

        Args:
            reference: Name, digest or reference; a digest removes all of its names.
            force: Delete a file in use too: who has it open keeps it until it ends.

        Raises:
            NotFound: There is none.
            Conflict: It is in use.
        """
        with self._changing():
            model = self.show(reference)
            others = [
                record
                for record in self._records().values()
                if record.digest == model.record.digest and record.name != model.record.name
            ]
            if others and reference == model.record.name:
                self._name_path(reference).unlink()
                return model
            if not force and model.in_use:
                raise Conflict(
                    f"model {model.record.name} is in use: stop the nodes that run it, or --force"
                )
            self._drop(model.record.digest)
        return model

    def pin(self, reference: str, *, pinned: bool = True) -> StoredModel:
        """Keep a model whatever the disk budget says, or no longer.

        Raises:
            NotFound: There is none.
        """
        with self._changing():
            record = self._must_find(reference).model_copy(update={"pinned": pinned})
            disk.write_json(self._name_path(record.name), record.model_dump())
        return self._stored(record)

    def check_free(self, name: str, source: str, digest: str | None = None) -> None:
        """Check, before anything is fetched, that a name can be given to a file.

        Raises:
            ConfigurationError: It is no name.
            Conflict: It stands for something from elsewhere.
        """
        taken = self._records().get(check_name(name))
        if taken is not None and taken.source != source and taken.digest != digest:
            raise Conflict(
                f"the name {name} stands for a model from {taken.reference}: choose another with "
                f"--name, or run `foam model remove {name}` first",
                name=name,
            )

    def make_room(self, size_bytes: int, *, beside: Path | None = None) -> None:
        """See that a file fits the disk and the budget, evicting what was used longest ago.

        Args:
            size_bytes: Size of the file.
            beside: What is there of it already.

        Raises:
            ConfigurationError: It cannot fit; gives the figures.
        """
        with self._changing():
            self._make_room(size_bytes, beside)

    def adopt(self, file: Path, digest: str, origin: Origin) -> StoredModel:
        """Take a whole file into the store under a name.

        Args:
            file: On the disk of the store; it is moved.
            digest: Its SHA-256, hex, computed by the caller.
            origin: Where it comes from.

        Raises:
            BrokenModel: It is no whole GGUF file.
            ConfigurationError: It does not fit, or is part of a split model.
            Conflict: Its name stands for something from elsewhere.
        """
        info = inspect(file, any_format=origin.any_format)
        size = file.stat().st_size
        with self._changing():
            self.check_free(origin.name, origin.source, digest)
            blob = self._blobs / digest
            if not (blob.is_file() and blob.stat().st_size == size):
                self._make_room(size, file)
                file.chmod(0o444)
                file.replace(blob)
                disk.sync_folder(self._blobs)
            elif not file.samefile(blob):
                file.unlink()
            return self._enter(blob, info, origin)

    def name_stored(self, digest: str, origin: Origin) -> StoredModel | None:
        """Give a stored file a name; None when it is not stored."""
        with self._changing():
            blob = self._blobs / digest
            if not blob.is_file():
                return None
            self.check_free(origin.name, origin.source, digest)
            info = inspect(blob, any_format=origin.any_format)
            return self._enter(blob, info, origin)

    def sweep(self) -> None:
        """Delete downloads that were given up long ago, and blobs without a name."""
        with self._changing():
            oldest = self._clock() / 1000 - self._keep_partial_s
            for partial in self.partials.glob("*.partial"):
                if partial.stat().st_mtime < oldest and not disk.is_held(partial):
                    _log.info("partial.swept", file=partial.name)
                    partial.unlink()
            for side in self.partials.glob("*.json"):
                if not side.with_suffix(".partial").exists():
                    side.unlink()
            named = {record.digest for record in self._records().values()}
            for blob in self._blobs.iterdir():
                if blob.name not in named and not disk.is_held(blob):
                    blob.unlink()

    def _enter(self, blob: Path, info: GgufInfo | None, origin: Origin) -> StoredModel:
        old = self._records().get(origin.name)
        record = ModelRecord(
            name=origin.name,
            digest=blob.name,
            size_bytes=blob.stat().st_size,
            reference=origin.reference,
            source=origin.source,
            etag=origin.etag,
            modified=origin.modified,
            pinned=origin.pinned or (old is not None and old.pinned),
            added_at_ms=self._clock(),
            architecture=info.architecture if info else None,
            quantisation=info.quantisation if info else None,
            parameters=info.parameters if info else None,
            context_length=info.context_length if info else None,
        )
        self._touch(blob)
        disk.write_json(self._name_path(record.name), record.model_dump())
        if old is not None and old.digest != record.digest:
            named = {one.digest for one in self._records().values()}
            if old.digest not in named and not disk.is_held(self._blobs / old.digest):
                self._drop(old.digest)
        return self._stored(record)

    def _make_room(self, size_bytes: int, beside: Path | None) -> None:
        there = beside.stat().st_size if beside is not None and beside.exists() else 0
        free = shutil.disk_usage(self.folder).free - _SPARE_BYTES
        if size_bytes - there > free:
            raise ConfigurationError(
                f"the model needs {size_bytes - there} more bytes on the disk of {self.folder}, "
                f"{max(0, free)} are free: remove models (`foam model list`) or other files",
                need_bytes=size_bytes - there,
                free_bytes=max(0, free),
            )
        if self.budget_bytes is None:
            return
        blobs = sorted(self._blobs.iterdir(), key=lambda blob: blob.stat().st_mtime_ns)
        taken = sum(blob.stat().st_size for blob in blobs)
        taken += sum(_promised(p) for p in self.partials.glob("*.partial") if p != beside)
        too_much = taken + size_bytes - self.budget_bytes
        if too_much > 0:
            self._evict(too_much, blobs, need=size_bytes, taken=taken)

    def _evict(self, too_much: int, blobs: Sequence[Path], *, need: int, taken: int) -> None:
        """Delete the least recently used files, or none when that is not enough."""
        pinned = {record.digest for record in self._records().values() if record.pinned}
        chosen: dict[Path, int] = {}
        try:
            for blob in blobs:
                if too_much > 0 and blob.name not in pinned:
                    descriptor = disk.lock(blob)
                    if descriptor is not None:  # nobody uses it, and nobody can from now on
                        chosen[blob] = descriptor
                        too_much -= blob.stat().st_size
            if too_much > 0:
                gain = sum(blob.stat().st_size for blob in chosen)
                raise ConfigurationError(
                    f"the model needs {need} bytes, the disk budget of {self.folder} is "
                    f"{self.budget_bytes}: {taken - gain} are taken by models in use or pinned and "
                    "by downloads; remove one (`foam model list`) or raise FOAM_MODELS_BUDGET",
                    need_bytes=need,
                    budget_bytes=self.budget_bytes,
                    kept_bytes=taken - gain,
                )
            for blob in chosen:
                _log.info("model.evicted", digest=blob.name[:12], size_bytes=blob.stat().st_size)
                self._drop(blob.name)
        finally:
            for descriptor in chosen.values():
                os.close(descriptor)

    def _drop(self, digest: str) -> None:
        for record in self._records().values():
            if record.digest == digest:
                self._name_path(record.name).unlink(missing_ok=True)
        disk.sync_folder(self._names)  # a name without a file would be worse than the reverse
        (self._blobs / digest).unlink(missing_ok=True)

    def _hold(self, blob: Path, name: str) -> None:
        """Take a shared lock on a blob, once, and note the use."""
        with self._guard:
            try:
                held = self._leases.get(blob.name)
                if held is None or not os.path.samestat(os.fstat(held), blob.stat()):
                    fresh = _lock_shared(blob)
                    if held is not None:
                        os.close(held)
                    self._leases[blob.name] = fresh
            except OSError as exc:
                raise ConfigurationError(
                    f"the file of model {name} cannot be read: {exc.strerror or exc}; "
                    f"run `foam model remove {name}` and pull it again"
                ) from exc
            self._touch(blob)

    def _touch(self, blob: Path) -> None:
        now = self._clock() * 1_000_000
        with contextlib.suppress(OSError):  # the folder of another user: who uses it is not noted
            os.utime(blob, ns=(now, now))

    def _stored(self, record: ModelRecord) -> StoredModel:
        path = self._blobs / record.digest
        try:
            used = path.stat().st_mtime_ns // 1_000_000
        except OSError:
            return StoredModel(record, path, 0, in_use=False)
        return StoredModel(record, path, used, disk.is_held(path))

    def _must_find(self, reference: str) -> ModelRecord:
        record = self.find(reference)
        if record is None:
            raise NotFound(self._nothing(reference), model=reference)
        return record

    def _nothing(self, reference: str) -> str:
        names = sorted(self._records())
        stored = f"stored are {', '.join(names[:10])}" if names else "the store is empty"
        how = reference if "/" in reference else "https://… (or owner/repo/file.gguf)"
        return f"there is no model {reference}: {stored}; get it with `foam model pull {how}`"

    def _records(self) -> dict[str, ModelRecord]:
        records: dict[str, ModelRecord] = {}
        record: ModelRecord | None
        for path in sorted(self._names.glob("[!.]*.json")):
            try:
                record = ModelRecord.model_validate(disk.read_json(path))
            except (ValidationError, ConfigurationError):
                record = None
            if record is None or record.name != path.stem:
                _log.warning("model.record_damaged", file=str(path))
                continue
            records[record.name] = record
        return records

    def _name_path(self, name: str) -> Path:
        return self._names / f"{name}.json"

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        self._prepare()
        with disk.locked(self.folder / "store.lock", timeout_s=_CHANGE_TIMEOUT_S):
            yield

    def _prepare(self) -> None:
        try:
            for folder in (self._blobs, self._names, self.partials):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigurationError(
                f"the model store {self.folder} cannot be made: {exc.strerror or exc}"
            ) from exc


def inspect(file: Path, *, any_format: bool = False) -> GgufInfo | None:
    """Read the head of a model that is to be stored.

    Args:
        file: The file.
        any_format: Whether a file that does not begin like a GGUF is welcome.

    Returns:
        What its head says; None for another format.

    Raises:
        BrokenModel: It is no GGUF, or not a whole one.
        ConfigurationError: It is one of several parts.
    """
    if any_format:
        with file.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                return None
    info = read_gguf(file)
    if info.parts > 1:
        raise BrokenModel(
            file,
            f"is one of {info.parts} parts of a model: join them with `llama-gguf-split --merge` "
            "and import the whole file",
        )
    return info


def source_key(reference: str) -> str:
    """Return the digest by which a reference is known: it may hold keys that nobody should read."""
    return hashlib.sha256(reference.encode()).hexdigest()


def _lock_shared(blob: Path) -> int:
    """Wait the few milliseconds for which somebody asks whether a blob is in use."""
    end = time.monotonic() + _HOLD_TIMEOUT_S
    while (descriptor := disk.lock(blob, shared=True)) is None:
        if time.monotonic() >= end:
            raise Unavailable(f"{blob} is locked by another process: try again")
        time.sleep(_PAUSE_S)
    return descriptor


def _promised(partial: Path) -> int:
    """Return how large a file on its way is going to be."""
    side = disk.read_json(partial.with_suffix(".json")) or {}
    total = side.get("total")
    there = partial.stat().st_size if partial.exists() else 0
    return max(there, total) if isinstance(total, int) else there


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long, or no path at all
        return False
