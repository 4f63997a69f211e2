"""What a user writes to say which model to fetch, and how it is read.

======================================  ===========================================================
``https://host/path/model.gguf``        a file on a web server
``owner/repo/file.gguf[@revision]``     a file of a repository on the model hub
``hf:owner/repo[:Q4_K_M][@revision]``   the file of a repository with this quantisation
``./model.gguf``, ``file:///model.gguf``  a file of this machine: it is imported
======================================  ===========================================================
"""

import ipaddress
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from capability_schemas.errors import ConfigurationError

_PART: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REVISION: Final = r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{0,127}))?"
_HUB_FILE: Final = re.compile(
    rf"(?:hf:)?(?P<repo>{_PART}/{_PART})/(?P<file>[^@:?#\\]{{1,512}}){_REVISION}"
)
_HUB_KIND: Final = re.compile(
    rf"hf:(?P<repo>{_PART}/{_PART})(?::(?P<quantisation>[A-Za-z0-9_]{{1,32}}))?{_REVISION}"
)
_NOT_IN_NAMES: Final = re.compile(r"[^a-z0-9._-]+")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")
_ALGORITHM: Final = "sha256:"
_HEX_DIGITS: Final = 64


@dataclass(frozen=True, slots=True)
class WebReference:
    """A file on a web server.

    Attributes:
        url: Its address, without name and password.
        login: ``(name, password)`` that stood in the address; never written anywhere.
    """

    url: str = field(repr=False)  # its query may hold a key
    login: tuple[str, str] | None = field(default=None, repr=False)

    @property
    def file(self) -> str:
        """Last part of the path."""
        return unquote(urlsplit(self.url).path).rsplit("/", 1)[-1]

    @property
    def shown(self) -> str:
        """The address without its query, which may hold a key."""
        return urlunsplit(urlsplit(self.url)._replace(query="", fragment=""))


@dataclass(frozen=True, slots=True, kw_only=True)
class HubReference:
    """A file of a repository on the model hub.

    Attributes:
        repo: ``owner/name``.
        file: Path of the file; None: to be chosen by its quantisation.
        quantisation: Which one; None with no file: the usual one.
        revision: Branch, tag or commit.
    """

    repo: str
    file: str | None = None
    quantisation: str | None = None
    revision: str = "main"

    @property
    def shown(self) -> str:
        """The reference in one spelling."""
        at = "" if self.revision == "main" else f"@{self.revision}"
        if self.file is not None:
            return f"{self.repo}/{self.file}{at}"
        kind = f":{self.quantisation}" if self.quantisation else ""
        return f"hf:{self.repo}{kind}{at}"


@dataclass(frozen=True, slots=True)
class FileReference:
    """A file of this machine."""

    path: Path

    @property
    def shown(self) -> str:
        """Where it lies."""
        return str(self.path)


Reference = WebReference | HubReference | FileReference


def parse_reference(text: str) -> Reference:
    """Read a reference.

    Args:
        text: One of the forms in the table above.

    Raises:
        ConfigurationError: It has none of these forms.
    """
    scheme = text.split(":", 1)[0].lower() if "://" in text else ""
    if scheme in ("http", "https"):
        return _web(text)
    if scheme == "file":
        return FileReference(Path(unquote(urlsplit(text).path)))
    if not scheme:
        if text.startswith((".", "/", "~")) or Path(text).is_file():
            return FileReference(Path(text).expanduser())
        for form in (_HUB_KIND, _HUB_FILE):
            found = form.fullmatch(text)
            if found and ".." not in text:
                given = {name: value for name, value in found.groupdict().items() if value}
                return HubReference(**given)
        if "/" not in text and not text.startswith("hf:") and text.endswith(".gguf"):
            raise ConfigurationError(f"there is no file {text} in this folder")
    raise ConfigurationError(
        f"{_without_login(text)!r} names no model: use https://host/model.gguf, "
        "owner/repo/file.gguf[@revision], hf:owner/repo:Q4_K_M or the path of a file"
    )


def check_address(url: str, *, insecure: bool) -> SplitResult:
    """Return the parts of an address that may be asked.

    Args:
        url: ``https``, or ``http`` where nobody listens in between.
        insecure: Whether the user accepts ``http`` to any host.

    Raises:
        ConfigurationError: It is neither.
    """
    try:
        parts = urlsplit(url)
        port = parts.port  # a wrong one raises here
    except ValueError as exc:
        raise ConfigurationError(f"{_without_login(url)!r} is no address: {exc}") from exc
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ConfigurationError(f"{_without_login(url)!r} is no https address")
    if parts.scheme == "http" and not insecure and not is_loopback(parts.hostname):
        raise ConfigurationError(
            f"http://{parts.hostname} is not encrypted, so anybody on the way could change the "
            "model: use https, or --insecure together with --sha256"
        )
    return parts


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_own(host: str) -> bool:
    """Tell whether a host is this machine, or one that speaks only to it (link-local addresses)."""
    if is_loopback(host) or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_link_local or address.is_unspecified


def check_name(name: str) -> str:
    """Return a model's name unchanged when it is one.

    Raises:
        ConfigurationError: It holds other characters, or could be taken for something else.
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} cannot be a model's name: use 1 to 96 of a-z 0-9 . _ -, "
            "a letter or digit first"
        )
    return name


def name_for(file: str) -> str:
    """Make a model's name from that of its file: ``Qwen2.5 0.5B.gguf`` gives ``qwen2.5-0.5b``."""
    stem = file.rsplit("/", 1)[-1].lower().removesuffix(".gguf")
    name = _NOT_IN_NAMES.sub("-", stem).strip("._-")[:96]
    return name or "model"


def check_digest(text: str) -> str:
    """Return 64 lower-case hex digits of a SHA-256 digest, with or without ``sha256:`` before.

    Raises:
        ConfigurationError: It is none.
    """
    digits = text.strip().lower().removeprefix(_ALGORITHM)
    if len(digits) != _HEX_DIGITS or set(digits) - set("0123456789abcdef"):
        raise ConfigurationError(f"{text!r} is no SHA-256 digest: it has 64 hexadecimal digits")
    return digits


def _web(text: str) -> WebReference:
    try:
        parts = urlsplit(text)
        host = parts.hostname
    except ValueError as exc:
        raise ConfigurationError(f"{_without_login(text)!r} is no address: {exc}") from exc
    if not host or not parts.path.strip("/"):
        raise ConfigurationError(f"{_without_login(text)!r} names no file: add its path")
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1], fragment=""))
    reference = WebReference(bare)
    if parts.username:
        login = (unquote(parts.username), unquote(parts.password or ""))
        reference = replace(reference, login=login)
    return reference


def _without_login(text: str) -> str:
    return re.sub(r"//[^/@]*@", "//", text)
