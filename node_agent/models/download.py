"""One file from one web server to one partial file, through cuts, stalls and changes of mind.

HTTP as in RFC 9110: ``Range`` with ``If-Range`` (sections 13.1.5 and 14) resume; a strong ``ETag``,
a digest known beforehand or, for want of these, ``Last-Modified`` decide whether what is there may
be kept. This is the node's door to the HTTP library for models; only the command line loads it.
"""

import contextlib
import email.utils
import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Final
from urllib.parse import urljoin, urlsplit

import httpx2

from capability_schemas.errors import (
    AccessDenied,
    ConfigurationError,
    FoamError,
    NotFound,
    Unavailable,
)
from node_agent.models import disk
from node_agent.models.reference import check_address, is_own

_SYNC_BYTES: Final = 32 << 20
"""A partial is put on the disk, and trusted again, in steps of this size."""
_READ_BYTES: Final = 1 << 20
_REDIRECTS: Final = 8
_BUSY: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_SHA256_TAG: Final = re.compile(r'"?([0-9a-f]{64})"?')
_AGENT: Final = "foam-mesh"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a transfer is.

    Attributes:
        state: ``downloading``, ``retrying``, ``waiting`` (for another process), ``checking`` or
            ``copying``.
        done_bytes: Bytes that are there.
        total_bytes: Bytes there will be; None while the server does not say.
        detail: Why it is retried.
    """

    state: str
    done_bytes: int = 0
    total_bytes: int | None = None
    detail: str = ""


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a download is tried.

    Attributes:
        stall_s: Longest silence of a server, seconds.
        tries: Tries in a row that bring nothing new.
        backoff_s: Most before the first retry, seconds; doubles, with full jitter.
        backoff_limit_s: Longest such pause, and the longest ``Retry-After`` heeded, seconds.
    """

    stall_s: float = 30.0
    tries: int = 6
    backoff_s: float = 0.5
    backoff_limit_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """What to fetch.

    Attributes:
        url: Its address.
        shown: The address as people may see it.
        authorization: Header for the host of ``url``, and for no other.
        sha256: Its digest, hex, where it is known.
        size_bytes: Its size, where it is known.
        etag: Validator of a copy that is stored already: nothing is sent when it still holds.
        modified: Its date, likewise.
    """

    url: str = field(repr=False)  # its query may hold a key
    shown: str
    authorization: str | None = field(default=None, repr=False)
    sha256: str | None = None
    size_bytes: int | None = None
    etag: str | None = None
    modified: str | None = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came.

    Attributes:
        digest: SHA-256 of the file, hex.
        etag: Strong validator of the server, if it gave one.
        modified: Date of the server, likewise.
        resumed: Whether the file was put together from several answers.
    """

    digest: str
    etag: str | None
    modified: str | None
    resumed: bool


class _Cut(Exception):  # noqa: N818  # the end of a try, not an error yet
    """A try ended early; another one may do better.

    Args:
        reason: What happened, for people.
        after_s: Pause that the server asks for, seconds.
    """

    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.after_s = after_s


class Web:
    """Asks web servers, with the rules about encryption and secrets in one place.

    Args:
        insecure: Whether ``http`` is accepted from any host.
        patience: How long to wait and try.
        sleep: Waits; replaced in tests.
        rng: Spreads the pauses.
    """

    def __init__(
        self,
        *,
        insecure: bool = False,
        patience: Patience | None = None,
        sleep: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self.patience = patience or Patience()
        self._insecure = insecure
        self._sleep = sleep
        self._rng = rng or random.Random()  # noqa: S311  # spreads pauses, guards nothing
        self._client = httpx2.Client(
            headers={"User-Agent": _AGENT, "Accept-Encoding": "identity"},
            timeout=httpx2.Timeout(self.patience.stall_s),
            mounts={"all://localhost": None, "all://127.0.0.1": None, "all://[::1]": None},
        )

    def close(self) -> None:
        """Close every connection."""
        self._client.close()

    def check(self, url: str) -> None:
        """Check that an address may be asked.

        Raises:
            ConfigurationError: It may not: ``http`` without leave, or no address at all.
        """
        check_address(url, insecure=self._insecure)

    def pause(self, tries: int, after_s: float | None) -> None:
        """Wait before the next try, as long as the server asks or with full jitter."""
        patience = self.patience
        longest = min(patience.backoff_limit_s, patience.backoff_s * 2 ** min(tries, 16))
        wait = self._rng.uniform(0, longest) if after_s is None else after_s
        self._sleep(min(wait, patience.backoff_limit_s))

    @contextlib.contextmanager
    def get(
        self, remote: Remote, headers: dict[str, str]
    ) -> Iterator[tuple[httpx2.Response, dict[str, str]]]:
        """Ask for a file, follow redirects, and give the answer with what was said on the way.

        Secrets go to the host that was named and no further.

        Raises:
            ConfigurationError: A redirect leaves encryption behind, or goes in circles.
        """
        url, said = remote.url, dict[str, str]()
        start = _origin(url)
        for _ in range(_REDIRECTS):
            self.check(url)
            sent = dict(headers)
            if remote.authorization is not None and _origin(url) == start:
                sent["Authorization"] = remote.authorization
            with self._client.stream("GET", url, headers=sent) as response:
                linked = {k: v for k, v in response.headers.items() if k.startswith("x-linked-")}
                said = linked | said
                if not response.has_redirect_location:
                    yield response, said
                    return
                url = urljoin(url, response.headers["location"])
                if is_own(_host(url)) and not is_own(start[1] or ""):
                    raise ConfigurationError(
                        f"{remote.shown} is redirected to this machine itself: that is refused"
                    )
        raise ConfigurationError(f"{remote.shown} is redirected more than {_REDIRECTS} times")

    def json(self, remote: Remote, *, limit_bytes: int = 64 << 20) -> Any:
        """Ask for a JSON document, with retries.

        Raises:
            FoamError: It cannot be had, or is none.
        """
        reason = ""
        for tried in range(self.patience.tries):
            try:
                with _translated(), self.get(remote, {}) as (response, _):
                    refuse(response, remote)
                    body = bytearray()
                    for piece in response.iter_raw():
                        body += piece
                        if len(body) > limit_bytes:
                            raise ConfigurationError(f"{remote.shown} answers without end")
                    return httpx2.Response(200, content=bytes(body)).json()
            except (ValueError, RecursionError) as exc:
                raise ConfigurationError(f"{remote.shown} does not answer with JSON") from exc
            except _Cut as cut:
                reason = str(cut)
                self.pause(tried, cut.after_s)
        raise Unavailable(f"{remote.shown} cannot be read ({reason}): try again later")


class Download:
    """Fetches one file; the caller holds the partial's lock.

    Args:
        web: Asks.
        remote: What to fetch.
        partial: Where it grows; the sidecar lies beside it.
        room: Called with the size as soon as it is known; raises when there is no room.
        limit_bytes: Most bytes to take from a server that does not say how many there are.
        report: Told how far it is.
    """

    def __init__(
        self,
        *,
        web: Web,
        remote: Remote,
        partial: Path,
        room: Callable[[int], None],
        limit_bytes: int | None,
        report: Report,
    ) -> None:
        self._web = web
        self._remote = remote
        self._partial = partial
        self._side = partial.with_suffix(".json")
        self._room = room
        self._limit_bytes = limit_bytes
        self._report = report
        self._hash = hashlib.sha256()
        self._done = 0
        self._synced = 0
        self._total: int | None = None
        self._etag: str | None = None
        self._modified: str | None = None
        self._resumed = False

    def run(self) -> Fetched | None:
        """Fetch it; when interrupted, what is there serves the next run.

        Returns:
            What came; None when the stored copy still holds.

        Raises:
            FoamError: It cannot be had: refused, missing, too large, no server, no progress.
        """
        try:
            with self._partial.open("r+b", buffering=0) as file:
                try:
                    self._take_up(file)
                    if not self._fetch(file):
                        return None
                finally:
                    self._sync(file)
        except OSError as exc:
            raise ConfigurationError(
                f"{self._partial} cannot be written ({exc.strerror or exc}): free some disk space "
                "and run the same command again to go on",
                errno=exc.errno,
            ) from exc
        self._report(Progress("checking", self._done, self._total))
        return Fetched(self._hash.hexdigest(), self._etag, self._modified, self._resumed)

    def _fetch(self, file: BinaryIO) -> bool:
        """Try until it is whole; False when the stored copy still holds."""
        best, idle = self._done, 0
        while self._done == 0 or self._done != self._total:
            try:
                return self._attempt(file)
            except _Cut as cut:
                self._sync(file)
                idle = 0 if self._done > best else idle + 1
                best = max(best, self._done)
                if idle >= self._web.patience.tries:
                    kept = f"{self._done} bytes are kept: run the same command again to go on"
                    raise Unavailable(
                        f"{self._remote.shown} cannot be fetched ({cut})"
                        f"{f', {kept}' if self._done else ''}",
                        done_bytes=self._done,
                    ) from cut
                self._report(Progress("retrying", self._done, self._total, str(cut)))
                self._web.pause(idle, cut.after_s)
        return True

    def _take_up(self, file: BinaryIO) -> None:
        """Go on where an earlier process stopped, as far as that is on the disk for sure."""
        side = disk.read_json(self._side) or {}
        there = os.fstat(file.fileno()).st_size
        synced = side.get("synced")
        keep = min(there, synced) if isinstance(synced, int) and synced > 0 else 0
        if None not in (meant := {side.get("sha256"), self._remote.sha256}) and len(meant) > 1:
            keep = 0
        file.truncate(keep)
        for _ in range(0, keep, _READ_BYTES):
            self._hash.update(file.read(min(_READ_BYTES, keep - self._done)))
            self._done = file.tell()
        self._synced = self._done
        if self._done:
            self._total, self._etag = side.get("total"), side.get("etag")
            self._modified = side.get("modified")
            self._resumed = True

    def _attempt(self, file: BinaryIO) -> bool:
        """Ask once. Returns whether the file is whole; False when the stored copy still holds."""
        headers = self._condition(file)
        with _translated(), self._web.get(self._remote, headers) as (response, said):
            if response.status_code == httpx2.codes.NOT_MODIFIED:
                return False
            if response.status_code == httpx2.codes.RANGE_NOT_SATISFIABLE:
                if self._total is not None and self._done == self._total:
                    return True
                self._start_over(file)
                raise _Cut("the server no longer has what was to follow", after_s=0.0)
            refuse(response, self._remote)
            self._begin(file, response, said)
            for piece in response.iter_raw():
                self._write(file, piece)
        if self._total is not None and self._done != self._total:
            raise _Cut(f"the connection ended at byte {self._done} of {self._total}")
        self._total = self._done
        return True

    def _condition(self, file: BinaryIO) -> dict[str, str]:
        if self._done:
            headers = {"Range": f"bytes={self._done}-"}
            if self._etag is not None:
                return headers | {"If-Range": self._etag}
            if self._remote.sha256 is not None:
                return headers
            if self._modified is not None:
                return headers | {"If-Range": self._modified}
            self._start_over(file)
        elif self._remote.etag is not None:
            return {"If-None-Match": self._remote.etag}
        elif self._remote.modified is not None:
            return {"If-Modified-Since": self._remote.modified}
        return {}

    def _begin(self, file: BinaryIO, response: httpx2.Response, said: dict[str, str]) -> None:
        """Compare what the server says about the file with what is known of it."""
        if response.headers.get("content-encoding", "identity") != "identity":
            raise ConfigurationError(f"{self._remote.shown}: the server packs the file unasked")
        etag = response.headers.get("etag")
        etag = etag if etag and etag.startswith('"') else None
        total = _length(response)
        if response.status_code == httpx2.codes.PARTIAL_CONTENT:
            first, total = _content_range(response)
            changed = (etag and self._etag and etag != self._etag) or (
                total is not None and self._total is not None and total != self._total
            )
            if changed or first != self._done:
                self._start_over(file)
                raise _Cut("the file changed on the server", after_s=0.0)
            self._resumed = True
        else:  # the first try; or no ranges here, or the file changed: from the start
            self._start_over(file)
        self._etag, self._modified = etag or self._etag, response.headers.get("last-modified")
        self._total = total if total is not None else self._total
        self._check_claims(said)
        if self._total is not None:
            self._room(self._total)
        self._write_side()

    def _check_claims(self, said: dict[str, str]) -> None:
        size = self._remote.size_bytes
        if size is not None and self._total is not None and size != self._total:
            raise ConfigurationError(
                f"{self._remote.shown} has {self._total} bytes, the hub says {size}: "
                "the server does not have the right file"
            )
        if found := _SHA256_TAG.fullmatch(said.get("x-linked-etag", "")):
            if self._remote.sha256 not in (None, found[1]):
                raise ConfigurationError(
                    f"{self._remote.shown} has the digest {found[1]}, not {self._remote.sha256}"
                )
            self._remote = replace(self._remote, sha256=found[1])

    @property
    def expected(self) -> str | None:
        """The digest that the file must have, hex, as far as anybody has said."""
        return self._remote.sha256

    def _write(self, file: BinaryIO, piece: bytes) -> None:
        limit = self._total if self._total is not None else self._limit_bytes
        if limit is not None and self._done + len(piece) > limit:
            if self._total is None:
                raise ConfigurationError(
                    f"{self._remote.shown} is larger than the disk budget of {limit} bytes"
                )
            raise _Cut("the server sends more than it announced")
        view = memoryview(piece)
        while view:
            written = file.write(view)
            self._hash.update(view[:written])
            view = view[written:]
            self._done += written
        if self._done - self._synced >= _SYNC_BYTES:
            self._sync(file)
        self._report(Progress("downloading", self._done, self._total))

    def _start_over(self, file: BinaryIO) -> None:
        file.seek(0)
        file.truncate(0)
        self._hash = hashlib.sha256()
        self._done = self._synced = 0
        self._total = self._etag = self._modified = None
        self._resumed = False

    def _sync(self, file: BinaryIO) -> None:
        os.fsync(file.fileno())
        self._synced = self._done
        self._write_side()

    def _write_side(self) -> None:
        disk.write_json(
            self._side,
            {
                "from": self._remote.shown,
                "sha256": self._remote.sha256,
                "etag": self._etag,
                "modified": self._modified,
                "total": self._total,
                "synced": self._synced,
            },
        )


def refuse(response: httpx2.Response, remote: Remote) -> None:
    """Turn an answer that is no file into an error.

    Raises:
        FoamError: It is final.
        _Cut: Another try may succeed.
    """
    status = response.status_code
    if status in (httpx2.codes.OK, httpx2.codes.PARTIAL_CONTENT):
        return
    if status in _BUSY:
        raise _Cut(f"the server answers {status}", after_s=_retry_after(response))
    error: type[FoamError] = ConfigurationError
    remedy = "check the address"
    if status in (401, 403):
        error, remedy = AccessDenied, "it wants a login: set FOAM_HUB_TOKEN to a file with a token"
        if remote.authorization is not None:
            remedy = "the token or password is wrong, or the model's terms are not accepted"
    elif status in (404, 410):
        error, remedy = NotFound, "check the name, the file and the revision"
    raise error(f"{remote.shown}: the server answers {status}: {remedy}", status=status)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except httpx2.TimeoutException as exc:
        raise _Cut("the server fell silent") from exc
    except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as exc:
        raise ConfigurationError(f"not an address: {exc}") from exc
    except httpx2.TransportError as exc:
        raise _Cut(f"the connection broke: {exc}" if str(exc) else "the connection broke") from exc


def _origin(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # `Web.check` says so
        return ""


def _length(response: httpx2.Response) -> int | None:
    text = response.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() else None


def _content_range(response: httpx2.Response) -> tuple[int, int | None]:
    found = _RANGE.fullmatch(response.headers.get("content-range", ""))
    if found is None:
        return -1, None
    return int(found[1]), None if found[3] == "*" else int(found[3])


def _retry_after(response: httpx2.Response) -> float | None:
    text = response.headers.get("retry-after", "")
    if text.isascii() and text.isdigit():
        return float(text)
    date, now = (
        email.utils.parsedate_tz(text),
        email.utils.parsedate_tz(response.headers.get("date", "")),
    )
    if date is None or now is None:
        return None
    return max(0.0, email.utils.mktime_tz(date) - email.utils.mktime_tz(now))
