r"""What outlives the process of the embedded broker: retained messages, and wills not yet due.

One file that is only ever appended to. A record is handed to the system before the publisher gets
its confirmation, so nothing that was confirmed is lost when the process is killed; whoever runs the
store has the disk hold it every second, which bounds what a power failure takes. The file is
written anew, without what was replaced meanwhile, when more than half of it is that.

::

    FOAM broker store 1\n
    length (4 bytes)  CRC-32 (4)  header length (2)  check of these (2)  header (JSON)  payload  …

The end of a file may hold half a record: that of the moment the process died. It was never
confirmed, and is cut off. Anything else that does not fit is damage: what was read up to there
counts, and the file is set aside.
"""

import json
import os
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog

from capability_schemas.errors import ConfigurationError

_MAGIC: Final = b"FOAM broker store 1\n"
_FRAME: Final = struct.Struct(">IIHH")
_CHECKED: Final = struct.Struct(">IIH")
_REST_BYTES: Final = 1024 * 1024
_KEPT_DAMAGED: Final = 2
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message as it was published, or as it is to be.

    Attributes:
        topic: Topic name.
        payload: Payload.
        qos: 0 or 1.
        retain: Whether it is to be kept; always, of a retained message.
        username: Of a will: by whose rights it is published.
    """

    topic: str
    payload: bytes
    qos: int
    retain: bool = True
    username: str | None = None


@dataclass(slots=True)
class Found:
    """What a store held when it was opened.

    Attributes:
        retained: Retained messages.
        wills: Wills of the clients that were connected, by client id.
        aside: Where the damaged file was put; None: it was sound.
    """

    retained: list[StoredMessage] = field(default_factory=list)
    wills: dict[str, StoredMessage] = field(default_factory=dict)
    aside: Path | None = None


class Damaged(Exception):  # noqa: N818  # told to nobody outside
    """A file is not what this module wrote."""


class BrokerStore:
    """The file. Blocking, and fast: an append is one write to the system's memory.

    A disk that is full or broken stops nothing: it is logged, everything stays in memory, and the
    file is written anew as soon as that works.

    Args:
        path: The file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._live: dict[tuple[str, str], bytes] = {}
        self._live_bytes = 0
        self._file = -1
        self._size = 0
        self._dirty = False
        self._failed_at: float | None = None  # since when the file lacks something

    def open(self) -> Found:
        """Read what is there, and be ready to write.

        Raises:
            ConfigurationError: The file cannot be read or made at all.
        """
        found = Found()
        try:
            if self._path.exists():
                found = self._read()
            self._rewrite()
        except OSError as error:
            raise ConfigurationError(
                f"{self._path} cannot be used: {error.strerror or error}", path=str(self._path)
            ) from error
        return found

    def keep(self, message: StoredMessage) -> None:
        """Write a retained message down; one without payload clears its topic."""
        name = ("retained", message.topic)
        if not message.payload:
            if name in self._live:
                self._append(name, {"gone": True}, b"")
            return
        self._append(name, {"qos": message.qos}, message.payload)

    def expect(self, client_id: str, will: StoredMessage) -> None:
        """Write down what is to be published when a client does not come back."""
        header = {
            "topic": will.topic,
            "qos": will.qos,
            "retain": will.retain,
            "username": will.username,
        }
        self._append(("will", client_id), header, will.payload)

    def settle(self, client_id: str) -> None:
        """The will of a client was published, or is none any more; unknown ones are ignored."""
        if ("will", client_id) in self._live:
            self._append(("will", client_id), {"gone": True}, b"")

    def unsynced(self) -> int | None:
        """Write anew what could not be written; tell what the disk may not hold yet.

        Returns:
            A descriptor to sync and to close, in any thread; None: the disk holds everything.
        """
        if self._failed_at is not None:
            self._try(self._rewrite)
        if not self._dirty or self._file < 0:
            return None
        self._dirty = False
        return os.dup(self._file)

    def close(self) -> None:
        """Close the file, synced. Idempotent."""
        if self._file >= 0:
            self._try(lambda: os.fsync(self._file))
            os.close(self._file)
            self._file = -1

    def _append(self, name: tuple[str, str], header: dict[str, Any], payload: bytes) -> None:
        record = _encode({name[0]: name[1], **header}, payload)
        self._live_bytes -= len(self._live.pop(name, b""))
        if "gone" not in header:
            self._live[name] = record
            self._live_bytes += len(record)
        if self._failed_at is not None:
            return  # the whole of it is written soon
        if self._size + len(record) > 2 * self._live_bytes + _REST_BYTES:
            self._try(self._rewrite)
            return

        def write() -> None:
            _write_all(self._file, record)
            self._size += len(record)
            self._dirty = True

        self._try(write)

    def _try(self, step: Any) -> None:
        try:
            step()
        except OSError as error:
            self._note_failure(error)

    def _note_failure(self, error: OSError) -> None:
        if self._failed_at is None:
            _log.error(
                "store.not_written",
                path=str(self._path),
                reason=error.strerror or str(error),
                remedy="free space there: a restart of the broker now forgets what is new",
            )
            self._failed_at = time.monotonic()

    def _rewrite(self) -> None:
        """Write everything that counts into a new file, and put it in the place of the old one."""
        aside = self._path.with_name(f"{self._path.name}.new")
        file = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        try:
            _write_all(file, _MAGIC + b"".join(self._live.values()))
            os.fsync(file)
            aside.replace(self._path)
        except BaseException:
            os.close(file)
            raise
        if self._file >= 0:
            os.close(self._file)
        self._file, self._size = file, len(_MAGIC) + self._live_bytes
        if self._failed_at is not None:
            behind_s = round(time.monotonic() - self._failed_at, 1)
            _log.info("store.written_again", path=str(self._path), behind_s=behind_s)
            self._failed_at = None

    def _read(self) -> Found:
        found = Found()
        data = self._path.read_bytes()
        try:
            for name, header, payload, record in _records(data):
                self._live_bytes -= len(self._live.pop(name, b""))
                if "gone" in header:
                    continue
                _message(name, header, payload)  # so that nothing unreadable is kept
                self._live[name] = record
                self._live_bytes += len(record)
        except Damaged as damage:
            found.aside = self._set_aside(str(damage))
        for (kind, key), record in self._live.items():
            header, payload = _decode(record)
            message = _message((kind, key), header, payload)
            if kind == "will":
                found.wills[key] = message
            else:
                found.retained.append(message)
        return found

    def _set_aside(self, why: str) -> Path:
        moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        aside = self._path.with_name(f"{self._path.name}.damaged-{moment}")
        self._path.replace(aside)
        _log.error(
            "store.damaged",
            path=str(self._path),
            aside=str(aside),
            reason=why,
            read=len(self._live),
            remedy="members publish what they are again when they connect",
        )
        old = sorted(self._path.parent.glob(f"{self._path.name}.damaged-*"))[:-_KEPT_DAMAGED]
        for path in old:
            path.unlink(missing_ok=True)
        return aside


def _write_all(file: int, data: bytes) -> None:
    """Write everything, or leave the file as long as it was.

    Raises:
        OSError: It could not be written.
    """
    before = os.fstat(file).st_size
    left = memoryview(data)
    try:
        while left:
            left = left[os.write(file, left) :]
    except OSError:
        os.ftruncate(file, before)
        raise


def _encode(header: dict[str, Any], payload: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    body = text + payload
    frame = (len(body), zlib.crc32(body), len(text))
    return _FRAME.pack(*frame, _check_of(*frame)) + body


def _check_of(length: int, checksum: int, text_bytes: int) -> int:
    return zlib.crc32(_CHECKED.pack(length, checksum, text_bytes)) & 0xFFFF


def _decode(record: bytes) -> tuple[dict[str, Any], bytes]:
    _, _, text_bytes, _ = _FRAME.unpack_from(record)
    middle = _FRAME.size + text_bytes
    return json.loads(record[_FRAME.size : middle]), record[middle:]


def _records(data: bytes) -> Iterator[tuple[tuple[str, str], dict[str, Any], bytes, bytes]]:
    """Take a file apart; half a record at its end is passed over.

    Raises:
        Damaged: Something else does not fit.
    """
    if not data.startswith(_MAGIC):
        if _MAGIC.startswith(data):  # died with its first breath
            return
        raise Damaged("it does not begin as a store of this version")
    at = len(_MAGIC)
    while len(data) - at >= _FRAME.size:
        length, checksum, text_bytes, check = _FRAME.unpack_from(data, at)
        if check != _check_of(length, checksum, text_bytes) or text_bytes > length:
            raise Damaged(f"there is no record at byte {at}")
        end = at + _FRAME.size + length
        if end > len(data):
            return
        record = data[at:end]
        if zlib.crc32(record[_FRAME.size :]) != checksum:
            raise Damaged(f"the record at byte {at} does not have its checksum")
        try:
            header, payload = _decode(record)
            kind = "will" if "will" in header else "retained"
            name = (kind, str(header[kind]))
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(f"the record at byte {at} is none: {error}") from error
        yield name, header, payload, record
        at = end


def _message(name: tuple[str, str], header: dict[str, Any], payload: bytes) -> StoredMessage:
    """Make the message of a record.

    Raises:
        Damaged: A field is missing or of another kind.
    """
    kind, key = name
    try:
        if kind == "retained":
            return StoredMessage(topic=key, payload=payload, qos=int(header["qos"]))
        return StoredMessage(
            topic=str(header["topic"]),
            payload=payload,
            qos=int(header["qos"]),
            retain=bool(header["retain"]),
            username=str(header["username"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"the record of {key} lacks a field: {error}") from error
