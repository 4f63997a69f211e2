"""The model hub: which file of a repository is meant, and where it lies.

The HTTP interface of the Hugging Face Hub, which mirrors speak too: ``GET
/api/models/{repo}/revision/{revision}?blobs=true`` lists the files, with size and SHA-256 of the
large ones (``lfs``); ``/{repo}/resolve/{commit}/{file}`` gives one. A reference is pinned to the
commit that it meant when it was read, so that a resumed download cannot mix two versions.
"""

import re
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from capability_schemas.errors import ConfigurationError, NotFound
from node_agent.models.download import Remote, Web
from node_agent.models.reference import HubReference

_USUAL: Final = ("q4_k_m", "q8_0")
"""Quantisations taken when none is named, best liked first (as llama.cpp's ``-hf`` does)."""
_PART: Final = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_SHOWN: Final = 12


class _Large(BaseModel):
    model_config = ConfigDict(extra="ignore")

    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    size: int | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="ignore")

    rfilename: str
    size: int | None = None
    lfs: _Large | None = None


class _Repository(BaseModel):
    model_config = ConfigDict(extra="ignore")

    sha: str = Field(pattern=r"^[0-9a-f]{6,64}$")
    siblings: tuple[_File, ...] = ()


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file that was found.

    Attributes:
        remote: How to fetch it.
        file: Its path in the repository.
        commit: The commit it was found in.
    """

    remote: Remote
    file: str
    commit: str


class Hub:
    """A model hub.

    Args:
        web: Asks.
        endpoint: Its address.
        token: Access token; sent to ``endpoint`` alone.
    """

    def __init__(self, *, web: Web, endpoint: str, token: str | None = None) -> None:
        self._web = web
        self._endpoint = endpoint.rstrip("/")
        self._authorization = None if token is None else f"Bearer {token}"

    def find(self, reference: HubReference) -> HubFile:
        """Find the file that a reference means.

        Raises:
            NotFound: There is no such repository, revision or file; names what there is.
            ConfigurationError: Several fit.
            FoamError: The hub refuses, or cannot be reached.
        """
        path = f"{reference.repo}/revision/{quote(reference.revision, safe='')}"
        listing = Remote(
            url=f"{self._endpoint}/api/models/{path}?blobs=true",
            shown=f"{self._endpoint}/api/models/{path}",
            authorization=self._authorization,
        )
        try:
            repository = _Repository.model_validate(self._web.json(listing))
        except ValidationError as exc:
            raise ConfigurationError(
                f"{listing.shown} does not answer like a model hub: check FOAM_HUB"
            ) from exc
        chosen = _choose(repository, reference)
        large = chosen.lfs or _Large(sha256=None)
        place = f"{reference.repo}/resolve/{repository.sha}/{quote(chosen.rfilename)}"
        remote = Remote(
            url=f"{self._endpoint}/{place}",
            shown=f"{self._endpoint}/{place}",
            authorization=self._authorization,
            sha256=large.sha256,
            size_bytes=chosen.size if large.size is None else large.size,
        )
        return HubFile(remote, chosen.rfilename, repository.sha)


def _choose(repository: _Repository, reference: HubReference) -> _File:
    files = {one.rfilename: one for one in repository.siblings}
    if reference.file is not None:
        if reference.file in files:
            return files[reference.file]
        raise NotFound(f"{reference.repo} has no file {reference.file}: {_there(files)}")
    models = {
        name: one
        for name, one in files.items()
        if name.lower().endswith(".gguf")
        and "mmproj" not in name.lower()
        and not _PART.search(name)
    }
    wanted = [reference.quantisation.lower()] if reference.quantisation else [*_USUAL]
    for kind in wanted:
        form = re.compile(rf"(?:^|[-._/]){re.escape(kind)}(?:[-._/]|$)", re.IGNORECASE)
        fits = [name for name in models if form.search(name)]
        if len(fits) > 1:
            raise ConfigurationError(
                f"{reference.repo} has several {kind} files, {', '.join(sorted(fits)[:_SHOWN])}: "
                f"name one, as {reference.repo}/FILE"
            )
        if fits:
            return models[fits[0]]
    if reference.quantisation is None and len(models) == 1:
        return next(iter(models.values()))
    raise NotFound(
        f"{reference.repo} has no GGUF file of quantisation {' or '.join(wanted)} in one piece: "
        f"{_there(files)}"
    )


def _there(files: dict[str, Any]) -> str:
    names = sorted(name for name in files if name.lower().endswith(".gguf"))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"there are {', '.join(names[:_SHOWN])}{more}" if names else "it has no GGUF files"
