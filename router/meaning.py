"""What a router knows of meaning: one encoder, the search in its space, and the way to others.

Vectors of different spaces are never compared. A query therefore carries the search that its vector
belongs to; a record that the registry embedded in another space is embedded here, from its words;
and another encoder takes over only when its own search holds the whole catalogue::

    load ─▶ embed what it lacks ─▶ calibrate ─▶ serve

Tasks are served by the old encoder until the swap, and those under way end with it.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import structlog

from capability_schemas.capability import CatalogRecord, EncoderSpace
from capability_schemas.errors import (
    ConfigurationError,
    Conflict,
    FoamError,
    InvalidTask,
    Overloaded,
)
from registry.encoders.base import Vectors
from registry.search import CapabilitySearch, recalibrate
from registry.vectors import capability_texts
from router.catalogue import Key

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_PAUSE_S: Final = 0.5
_STEP: Final = 8
"""Records taken into an index before tasks get their turn; each takes up to half a millisecond."""


class QueryEncoder(Protocol):
    """Embeds texts without blocking the event loop; ``EncoderThread`` and a test double do."""

    @property
    def space(self) -> EncoderSpace:
        """Space of the vectors."""
        ...

    async def encode_one(self, text: str) -> Vectors:
        """Return the unit vector of one text, float32, shape ``(dimension,)``."""
        ...

    async def encode(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors, float32, shape ``(len(texts), dimension)``."""
        ...

    async def start(self) -> None:
        """Load the model."""
        ...

    async def stop(self) -> None:
        """Let go of it; idempotent."""
        ...


EncoderFactory = Callable[[str, Path | None], QueryEncoder]
"""Makes an encoder, not started, of a backend and a model folder (None: that of the backend)."""


class Query(NamedTuple):
    """The words of a task, embedded.

    Attributes:
        text: The words.
        vector: Unit vector, float32, shape ``(dimension,)``.
        search: The search of the space that it belongs to.
    """

    text: str
    vector: Vectors
    search: CapabilitySearch


@dataclass(slots=True, eq=False)
class _Side:
    """An encoder and its search.

    Attributes:
        encoder: Embeds.
        search: Finds, in the space of ``encoder``.
        backend: Name the encoder was asked for by; None for the one the router started with.
        folder: Folder of its model, if one was named.
        users: Calls of the encoder under way.
    """

    encoder: QueryEncoder
    search: CapabilitySearch
    backend: str | None = None
    folder: Path | None = None
    users: int = 0

    async def encode(self, texts: Sequence[str]) -> Vectors:
        self.users += 1
        try:
            return await self.encoder.encode(texts)
        finally:
            self.users -= 1

    async def encode_one(self, text: str) -> Query:
        self.users += 1
        try:
            return Query(text, await self.encoder.encode_one(text), self.search)
        finally:
            self.users -= 1


class Meaning:
    """Owned by the router's event loop. Leaves an encoder when another has taken its place.

    Args:
        search: Semantic index of the admitted records.
        encoder: Embeds in the space of ``search``; started by its owner.
        encoders: Makes further encoders; without it this one stays.
        background: Builds indexes and writes snapshots; None: whoever needs one does it.
        folder: Where a snapshot of the index is kept; None: nowhere.
    """

    def __init__(
        self,
        *,
        search: CapabilitySearch,
        encoder: QueryEncoder,
        encoders: EncoderFactory | None = None,
        background: Executor | None = None,
        folder: Path | None = None,
    ) -> None:
        self._background = background
        self._folder = folder
        self._serving = _Side(encoder, search)
        self._next: _Side | None = None
        self._encoders = encoders
        self._unembedded = asyncio.Event()
        self._restored = False
        self._fitting = asyncio.Lock()
        self._stage: str | None = None
        self._asked: str | None = None
        self._failure: str | None = None

    @property
    def search(self) -> CapabilitySearch:
        """The search that serves."""
        return self._serving.search

    async def embed(self, text: str) -> Query:
        """Embed the words of a task; cancellation is safe."""
        return await self._serving.encode_one(text)

    def upsert(self, record: CatalogRecord) -> bool:
        """Take a record into the catalogue; one of another space waits to be embedded here.

        Returns:
            Whether every search has it, so that its vectors need not be kept elsewhere.
        """
        taken = [side.search.upsert(record) for side in self._sides()]
        if not all(taken):
            self._unembedded.set()
        return all(taken)

    def remove(self, key: Key) -> None:
        """Forget a record."""
        for side in self._sides():
            side.search.remove(key)

    async def calibrate(self) -> None:
        """Fit the threshold to the present catalogue; the encoder takes tasks in between."""
        async with self._fitting:
            side = self._serving
            if self._restored:  # what no record came for meanwhile is no longer offered
                self._restored = False
                side.search.forget_unclaimed()
            await recalibrate(side.search, side.encode)

    @property
    def needs_calibration(self) -> bool:
        """Whether the catalogue has changed since the last fit."""
        return self.search.needs_calibration

    def describe(self) -> dict[str, Any]:
        """Tell which space serves, what is missing in it, and how a change is getting on."""
        side, other = self._serving, self._next
        return {
            "space": side.search.space.model_dump(),
            "backend": side.backend,
            "folder": None if side.folder is None else str(side.folder),
            "lasts": "always" if side.backend is None else "until the router starts anew",
            "records": len(side.search),
            "unembedded": len(side.search.unembedded()),
            "changing": None
            if self._stage is None
            else {
                "stage": self._stage,
                "backend": self._asked,
                "space": other.search.space.model_dump() if other else None,
                "records": len(other.search) if other else 0,
                "unembedded": len(other.search.unembedded()) if other else None,
            },
            "failure": self._failure,
        }

    def describe_calibration(self) -> dict[str, Any]:
        """Tell what is fitted to the catalogue, as JSON."""
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in asdict(self.search.calibration).items()
        }

    # ---- records of another space

    async def embed_missing(self) -> int:
        """Wait for records of another space, and embed them; return how many were."""
        await self._unembedded.wait()
        self._unembedded.clear()
        side = self._serving
        count = await self._fill(side)
        if count:
            _log.info("records.embedded", count=count, space=side.search.space.revision)
        return count

    async def _fill(self, side: _Side) -> int:
        """Embed every record that the search of a side holds no vectors of; the same words once."""
        tried: set[tuple[Key, int, int]] = set()
        done = 0
        while missing := await self._missing(side, tried):
            for texts, records in missing.items():
                if side not in self._sides():
                    return done
                rows = await self._patiently(side, texts)
                try:
                    done += await self._place(side, records, rows)
                except ValueError as error:
                    _log.warning("record.unsearchable", text=texts[0][:80], error=str(error))
        return done

    async def _place(self, side: _Side, records: Sequence[CatalogRecord], rows: Vectors) -> int:
        done = 0
        for step, record in enumerate(records):
            if side.search.waiting(record.key) is record:  # else a later one has come meanwhile
                done += side.search.upsert(record, parts=rows)
            if step % _STEP == _STEP - 1:
                await asyncio.sleep(0)
        return done

    async def _missing(
        self, side: _Side, tried: set[tuple[Key, int, int]]
    ) -> dict[tuple[str, ...], list[CatalogRecord]]:
        found: defaultdict[tuple[str, ...], list[CatalogRecord]] = defaultdict(list)
        for step, key in enumerate(side.search.unembedded()):
            record = side.search.waiting(key)
            if record is not None and (key, *record.order) not in tried:
                tried.add((key, *record.order))
                texts = capability_texts(
                    record.function, record.description, record.examples, record.input_schema
                )
                found[tuple(texts)].append(record)
            if step % _STEP == _STEP - 1:
                await asyncio.sleep(0)
        return found

    async def _patiently(self, side: _Side, texts: Sequence[str]) -> Vectors:
        while True:
            try:
                return await side.encode(texts)
            except Overloaded:
                await asyncio.sleep(_PAUSE_S)

    # ---- another encoder

    async def change(
        self, backend: str, folder: Path | None, records: Mapping[Key, CatalogRecord]
    ) -> EncoderSpace:
        """Load another encoder, embed the catalogue with it, and have it serve.

        The old one serves meanwhile, and for good when this fails or is cancelled.

        Args:
            backend: Name of the backend.
            folder: Model folder; None: that of the backend.
            records: The catalogue, which may change meanwhile.

        Returns:
            The space that serves now.

        Raises:
            InvalidTask: This router cannot load encoders.
            Conflict: Another change is under way.
            ConfigurationError: The encoder cannot be loaded, or embeds in the space that serves.
        """
        if self._encoders is None:
            raise InvalidTask(
                "this router was started without a way to load encoders", field="verb"
            )
        if self._stage is not None:
            raise Conflict(f"the encoder is being changed ({self._stage}): wait for its end")
        self._stage, self._asked, self._failure = "loading", backend, None
        encoder = self._encoders(backend, folder)
        try:
            await encoder.start()
            side = _Side(encoder, self._new_search(encoder.space), backend, folder)
            self._stage, self._next = "embedding", side
            await self._take_over(side, records)
        except BaseException as error:
            self._failure = error.message if isinstance(error, FoamError) else repr(error)
            await encoder.stop()
            raise
        finally:
            self._stage, self._next = None, None
        old, self._serving = self._serving, side
        self._unembedded.set()  # what came in the last moment was looked for on the old side only
        await self._leave(old)
        return side.search.space

    def _new_search(self, space: EncoderSpace) -> CapabilitySearch:
        if space == self._serving.search.space:
            raise ConfigurationError(
                f"that encoder embeds in the space that serves already: {space.model}"
                f" {space.revision}"
            )
        return CapabilitySearch(space=space, background=self._background)

    async def _take_over(self, side: _Side, records: Mapping[Key, CatalogRecord]) -> None:
        for step, key in enumerate(list(records)):
            record = records.get(key)  # it may have been withdrawn since
            if record is not None:
                side.search.upsert(record)
            if step % _STEP == _STEP - 1:
                await asyncio.sleep(0)
        await self._fill(side)
        self._stage = "calibrating"
        await recalibrate(side.search, side.encode)
        await self._fill(side)  # what came meanwhile

    async def _leave(self, old: _Side) -> None:
        """Stop an encoder that serves no longer, once nobody waits for it."""
        while old.users:  # noqa: ASYNC110 - a few milliseconds, at most
            await asyncio.sleep(_PAUSE_S / 10)
        await old.encoder.stop()
        old.search.index.close()

    # ---- over a restart

    async def restore(self) -> None:
        """Take up the index of an earlier process, before the first record comes.

        One that is torn, or of another encoder, is left alone: the index is built anew.
        """
        if self._folder is None or not await asyncio.to_thread(self._folder.is_dir):
            return
        search = self._serving.search
        try:
            await asyncio.to_thread(search.restore, self._folder)
        except ConfigurationError as error:
            _log.warning("index.not_restored", folder=str(self._folder), reason=error.message)
        else:
            self._restored = True
            _log.info("index.restored", folder=str(self._folder), vectors=len(search.index))

    def maintain(self) -> bool:
        """Have the indexes take in what waits, for a few milliseconds; tell whether more does."""
        more = [side.search.index.maintain() for side in self._sides()]
        return any(more)

    async def close(self) -> None:
        """Keep the index, where it was much work, and let go of what was made here.

        Writing it stops the whole process for a while, so it is done when nobody waits any more.
        """
        search = self._serving.search
        if self._folder is not None and search.index.approximate:
            try:
                await asyncio.wrap_future(search.snapshot(self._folder))
            except ConfigurationError as error:
                _log.warning("index.not_saved", folder=str(self._folder), reason=error.message)
        search.index.close()
        if self._serving.backend is not None:
            await self._serving.encoder.stop()

    def _sides(self) -> tuple[_Side, ...]:
        return (self._serving,) if self._next is None else (self._serving, self._next)
