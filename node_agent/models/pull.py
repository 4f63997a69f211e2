"""Getting models into the store: from the web, from a hub, from a file."""

import base64
import contextlib
import hashlib
import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from capability_schemas.errors import ConfigurationError, Unavailable
from node_agent.models import disk
from node_agent.models.download import Download, Fetched, Progress, Remote, Report, Web
from node_agent.models.gguf import BrokenModel
from node_agent.models.hub import Hub
from node_agent.models.reference import (
    FileReference,
    HubReference,
    WebReference,
    check_digest,
    name_for,
    parse_reference,
)
from node_agent.models.store import ModelStore, Origin, StoredModel, inspect, source_key

_READ_BYTES: Final = 1 << 20
_PATIENCE_TRIES: Final = 4


def _silent(_: Progress) -> None:
    """Report nothing."""


class Puller:
    """Brings models into a store; a context manager, for its connections.

    Args:
        store: Where they go.
        web: Asks servers.
        hub: Address of the model hub.
        token: Access token for the hub, if there is one.
        offline: Refuse everything that is not a file of this machine.
        report: Told how far it is.
    """

    def __init__(
        self,
        *,
        store: ModelStore,
        web: Web,
        hub: str,
        token: str | None = None,
        offline: bool = False,
        report: Report = _silent,
    ) -> None:
        self._store = store
        self._web = web
        self._hub = Hub(web=web, endpoint=hub, token=token)
        self._offline = offline
        self._report = report

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._web.close()

    def pull(
        self,
        text: str,
        *,
        name: str | None = None,
        sha256: str | None = None,
        any_format: bool = False,
        pinned: bool = False,
    ) -> StoredModel:
        """Fetch a model, or go on with one that was interrupted.

        A reference that was pulled before is asked for again, and fetched when it changed. Of
        several processes that pull one reference, one fetches and the others wait.

        Args:
            text: A reference (`node_agent.models.reference`).
            name: Name in the store; the file's, in lower case, when None.
            sha256: Digest that the file must have.
            any_format: Take a file that is no GGUF.
            pinned: Keep it whatever the disk budget says.

        Raises:
            FoamError: It cannot be had; what was fetched is kept where that helps.
        """
        reference = parse_reference(text)
        expected = None if sha256 is None else check_digest(sha256)
        if isinstance(reference, FileReference):
            return self.take(
                reference.path, name=name, sha256=sha256, any_format=any_format, pinned=pinned
            )
        if self._offline:
            raise ConfigurationError(
                f"FOAM_OFFLINE is set, so {reference.shown} is not fetched: unset it, or bring the "
                "file here and run `foam model import FILE`"
            )
        remote, file = self._locate(reference)
        if expected is not None:
            if remote.sha256 not in (None, expected):
                raise ConfigurationError(
                    f"{reference.shown} has the digest {remote.sha256}, not {expected}"
                )
            remote = replace(remote, sha256=expected)
        origin = Origin(
            name=name or name_for(file),
            reference=reference.shown,
            source=source_key(
                reference.shown if isinstance(reference, HubReference) else remote.url
            ),
            pinned=pinned,
            any_format=any_format,
        )
        self._store.check_free(origin.name, origin.source, remote.sha256)
        self._store.sweep()
        if remote.sha256 and (found := self._store.name_stored(remote.sha256, origin)):
            return found
        return self._fetch(remote, origin)

    def take(
        self,
        path: Path,
        *,
        name: str | None = None,
        sha256: str | None = None,
        any_format: bool = False,
        pinned: bool = False,
        move: bool = False,
    ) -> StoredModel:
        """Import a file of this machine: a clone where the file system can, else a copy.

        No hard links: an edit of the original would change a file behind its digest.

        Args:
            path: The file.
            name: As for `pull`, like the next three.
            sha256: See there.
            any_format: See there.
            pinned: See there.
            move: Take the file away from where it is.

        Raises:
            FoamError: It is missing, broken, too large or not what ``sha256`` says.
        """
        expected = None if sha256 is None else check_digest(sha256)
        path = path.expanduser().absolute()
        if not path.is_file():
            kind = "is a folder, and no file" if path.is_dir() else "does not exist"
            raise ConfigurationError(f"{path} {kind}")
        inspect(path, any_format=any_format)
        origin = Origin(
            name=name or name_for(path.name),
            reference=str(path),
            source=source_key(str(path)),
            pinned=pinned,
            any_format=any_format,
        )
        self._store.check_free(origin.name, origin.source, expected)
        self._store.sweep()
        try:
            stored = self._import(path, expected, origin, move=move)
        except OSError as exc:
            raise ConfigurationError(
                f"{path} cannot be imported into {self._store.folder}: {exc.strerror or exc}"
            ) from exc
        if move:
            path.unlink(missing_ok=True)
        return stored

    def _import(
        self, path: Path, expected: str | None, origin: Origin, *, move: bool
    ) -> StoredModel:
        size = path.stat().st_size
        if move and path.stat().st_dev == self._store.partials.stat().st_dev:
            self._store.make_room(size, beside=path)
            digest = self._copy(path, None)
            _check(digest, expected, str(path))
            return self._store.adopt(path, digest, origin)
        self._store.make_room(size)
        copy = self._store.partials / f"import-{os.getpid()}-{origin.source[:12]}.partial"
        held = disk.lock(copy, create=True)
        if held is None:
            raise Unavailable(f"{path} is being imported already")
        try:
            digest = self._copy(path, held)
            _check(digest, expected, str(path))
            return self._store.adopt(copy, digest, origin)
        finally:
            copy.unlink(missing_ok=True)
            os.close(held)

    def _locate(self, reference: WebReference | HubReference) -> tuple[Remote, str]:
        if isinstance(reference, HubReference):
            found = self._hub.find(reference)
            return found.remote, found.file
        authorization = None
        if reference.login is not None:
            login = base64.b64encode(":".join(reference.login).encode()).decode()
            authorization = f"Basic {login}"
        self._web.check(reference.url)
        remote = Remote(url=reference.url, shown=reference.shown, authorization=authorization)
        return remote, reference.file

    def _fetch(self, remote: Remote, origin: Origin) -> StoredModel:
        """Fetch under the lock of the partial, whose name says what is fetched."""
        partial = self._store.partials / f"{source_key(remote.url)[:40]}.partial"
        before = self._store.from_source(origin.source)
        while (held := disk.lock(partial, create=True)) is None:
            self._wait(partial, origin)
        try:
            after = self._store.from_source(origin.source)
            if after is not None and after != before:  # whoever held the partial has fetched it
                same = replace(origin, etag=after.etag, modified=after.modified)
                if stored := self._store.name_stored(after.digest, same):
                    return stored
            for again in (True, False):
                stored = self._once(remote, origin, partial, again=again)
                if stored is not None:
                    return stored
            raise ConfigurationError(f"{remote.shown} cannot be put together")
        finally:
            _clear(partial, held)
            os.close(held)

    def _once(
        self, remote: Remote, origin: Origin, partial: Path, *, again: bool
    ) -> StoredModel | None:
        """Fetch and check; None when a file made of several answers does not fit together."""
        known = self._store.find(origin.name)
        if (
            known is not None
            and known.source == origin.source
            # "Not modified" says nothing of a digest that what is stored does not have.
            and remote.sha256 in (None, known.digest)
            and partial.stat().st_size == 0
        ):
            with contextlib.suppress(OSError):
                if self._store.show(origin.name).path.is_file():
                    remote = replace(remote, etag=known.etag, modified=known.modified)
        download = Download(
            web=self._web,
            remote=remote,
            partial=partial,
            room=lambda size: self._store.make_room(size, beside=partial),
            limit_bytes=self._store.budget_bytes,
            report=self._report,
        )
        fetched = download.run()
        if fetched is None:
            return self._store.show(origin.name)
        if again and fetched.resumed and download.expected not in (None, fetched.digest):
            _discard(partial)
            return None
        try:
            _check(fetched.digest, download.expected, remote.shown)
            return self._adopt(partial, fetched, origin)
        except (BrokenModel, _WrongDigest) as exc:
            _discard(partial)
            if isinstance(exc, BrokenModel):
                raise BrokenModel(remote.shown, exc.reason) from exc
            raise

    def _adopt(self, partial: Path, fetched: Fetched, origin: Origin) -> StoredModel:
        origin = replace(origin, etag=fetched.etag, modified=fetched.modified)
        stored = self._store.adopt(partial, fetched.digest, origin)
        partial.with_suffix(".json").unlink(missing_ok=True)
        return stored

    def _wait(self, partial: Path, origin: Origin) -> None:
        """Wait for the process that fetches the same file, as long as it gets somewhere."""

        def busy() -> bool:
            self._report(Progress("waiting", _size(partial)))
            return disk.is_held(partial)

        patience = self._web.patience
        longest = _PATIENCE_TRIES * (patience.stall_s + patience.backoff_limit_s)
        if not disk.wait_while(busy, lambda: _size(partial), patience_s=longest):
            raise Unavailable(
                f"another process fetches {origin.reference} and makes no progress: end it and "
                "try again"
            )

    def _copy(self, source: Path, target: int | None) -> str:
        """Copy a file, or only read it, and return its digest."""
        with source.open("rb") as file:
            written = target is None or disk.clone(file.fileno(), target)
            total = os.fstat(file.fileno()).st_size
            digest, done = hashlib.sha256(), 0
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
                done += len(piece)
                if not written and target is not None:
                    _write_all(target, piece)
                self._report(Progress("copying", done, total))
            if os.fstat(file.fileno()).st_size != done or done != total:
                raise ConfigurationError(
                    f"{source} changed while it was read: import it when it is finished"
                )
        if target is not None:
            os.fsync(target)
        return digest.hexdigest()


class _WrongDigest(ConfigurationError):  # noqa: N818  # named by what to mend
    """A file is not the one that was meant."""


def _check(digest: str, expected: str | None, shown: str) -> None:
    if expected not in (None, digest):
        raise _WrongDigest(
            f"{shown} has the digest {digest}, not {expected}: it is another file, or was changed "
            "on the way; nothing of it is kept",
            digest=digest,
            expected=expected,
        )


def _write_all(descriptor: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(descriptor, view) :]


def _discard(partial: Path) -> None:
    os.truncate(partial, 0)
    partial.with_suffix(".json").unlink(missing_ok=True)


def _clear(partial: Path, held: int) -> None:
    """Remove an empty partial that is still ours, and what lies beside a partial that is gone."""
    with contextlib.suppress(OSError):
        ours = os.fstat(held)
        if ours.st_size == 0 and os.path.samestat(ours, partial.stat()):
            partial.with_suffix(".json").unlink(missing_ok=True)
            partial.unlink()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
