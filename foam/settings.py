"""Settings of the ``foam`` programs, and the only door to ``os.environ``.

A value is taken from, in this order: the command line (or a keyword argument), the environment, the
default.
Environment variables are named ``FOAM_`` plus the field name in capitals: ``FOAM_DATA``,
``FOAM_URL``, ``FOAM_USERNAME``, ``FOAM_PASSWORD``, ``FOAM_CA``, ``FOAM_SITE``, ``FOAM_ENCODER``,
``FOAM_ENCODER_BACKEND``, ``FOAM_MODEL``, ``FOAM_WATCH``, ``FOAM_MODELS``, ``FOAM_MODELS_BUDGET``,
``FOAM_HUB``, ``FOAM_HUB_TOKEN``, ``FOAM_OFFLINE``, ``FOAM_RULES``, ``FOAM_IDENTITY_FILE``,
``FOAM_UNSIGNED_ADMIN``, ``FOAM_LOG_LEVEL``. A variable
that looks like a misspelling of one of these is refused: ``FOAM_PASWORD`` must not silently mean
"no password".
"""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import platformdirs
from pydantic import BaseModel, ByteSize, ConfigDict, Field, SecretStr, ValidationError

from capability_schemas.errors import ConfigurationError
from capability_schemas.ids import Identifier

__all__ = ["ENVIRONMENT_PREFIX", "Settings", "child_environment", "load_settings"]

ENVIRONMENT_PREFIX: Final = "FOAM_"
_MISSPELT: Final = 0.8
"""Similarity (difflib ratio) from which an unknown name is taken for a misspelling."""

LogLevel = Literal["debug", "info", "warning", "error"]


def _default_data() -> Path:
    return platformdirs.user_state_path("foam")


def _default_models() -> Path:
    return platformdirs.user_data_path("foam") / "models"


class Settings(BaseModel):
    """What every ``foam`` command needs to know about its surroundings.

    Attributes:
        data: Folder of the mesh on this machine (``foam.mesh.MeshFolder``). Default: the user's
            state folder.
        url: Broker to use instead of the one the data folder names:
            ``mqtt://[user:password@]host:port``; of a cluster several, separated by commas: when
            one does not answer, the next is tried.
        username: Authenticated name to use with ``url``; it is also the ``{client}`` level of the
            topics.
        password: Password of ``username``.
        ca: PEM file of the authorities to trust at a broker with TLS; None: those that the identity
            was enrolled with, else the system's.
        site: Level ``{site}`` of every topic; None means the site that the data folder names, or
            ``local``.
        encoder: Folder of the exported ONNX encoder; None means the default folder of
            ``registry.encoders``.
        encoder_backend: ``onnx`` (default) or ``sentence_transformers`` (the reference; needs
            torch).
        model: GGUF file that the demo's language node runs; None means the shipped demo model.
        watch: Whether a node follows the files of its declaration and takes up edits.
        models: Folder of the model store, shared by every node of the user on this machine.
        models_budget: Most bytes that the store may take (``20GB``, ``20GiB``); what was used
            longest ago is evicted. None: no limit.
        hub: Address of the model hub, or of a mirror of it.
        hub_token: File that holds the access token for ``hub``; nobody but its owner may read it.
        offline: Fetch no models; what is stored and files are used.
        rules: File of the router's rules; None means ``rules.toml`` in the data folder, if it is
            there.
        identity_file: Identity that a client command acts as, made by ``foam enroll`` or
            ``foam device add``; None: a person of the data folder, or ``username``.
        unsigned_admin: Whether router and registry take requests of administrators that are not
            signed, on the broker's word; None: at a broker that they reach on this machine without
            TLS.
        tpm_key: Handle or context file of this machine's TPM attestation key, for ``tpm2_quote``;
            None: a node's evidence holds no quote.
        tpm_registers: Bank and registers that it quotes, as ``tpm2_quote -l`` takes them; None:
            ``sha256:0,1,2,3,4,7``, which is what rules ask for unless they say otherwise.
        log_level: Least severe level that is written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Path = Field(default_factory=_default_data)
    url: str | None = None
    username: Identifier | None = None
    password: SecretStr | None = None
    ca: Path | None = None
    site: Identifier | None = None
    encoder: Path | None = None
    encoder_backend: Literal["onnx", "sentence_transformers"] = "onnx"
    model: Path | None = None
    watch: bool = True
    models: Path = Field(default_factory=_default_models)
    models_budget: Annotated[ByteSize, Field(gt=0)] | None = None
    hub: str = "https://huggingface.co"
    hub_token: Path | None = None
    offline: bool = False
    rules: Path | None = None
    identity_file: Path | None = None
    unsigned_admin: Literal["allow", "refuse"] | None = None
    tpm_key: str | None = None
    tpm_registers: str | None = None
    log_level: LogLevel = "info"

    @property
    def rules_file(self) -> Path:
        """Where the router's rules are looked for."""
        return self.data / "rules.toml" if self.rules is None else self.rules


def load_settings(environ: Mapping[str, str] | None = None, **given: object) -> Settings:
    """Join the environment and explicit values into checked settings.

    Args:
        environ: Variables to read; None means the process's own.
        given: Values that win over the environment; None means "not given".

    Raises:
        ConfigurationError: A ``FOAM_`` variable is misspelt, or a value does not fit its field.
    """
    source = os.environ if environ is None else environ
    values: dict[str, object] = {}
    for name, value in source.items():
        if not name.startswith(ENVIRONMENT_PREFIX) or not value:
            continue
        field = name.removeprefix(ENVIRONMENT_PREFIX).lower()
        if field not in Settings.model_fields:
            meant = difflib.get_close_matches(field, Settings.model_fields, n=1, cutoff=_MISSPELT)
            if meant:
                known = ENVIRONMENT_PREFIX + meant[0].upper()
                raise ConfigurationError(
                    f"environment variable {name} is unknown; did you mean {known}?", variable=name
                )
            continue
        values[field] = value
    values.update({name: value for name, value in given.items() if value is not None})
    try:
        settings = Settings.model_validate(values)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        name = ENVIRONMENT_PREFIX + where.upper()
        raise ConfigurationError(f"setting {where} ({name}): {first['msg']}", field=where) from exc
    paths = {"data": settings.data, "models": settings.models, "rules": settings.rules}
    return settings.model_copy(
        update={name: path and path.expanduser().absolute() for name, path in paths.items()}
    )


def child_environment(**extra: str) -> dict[str, str]:
    """Return this process's environment for a child, without what names the user's own mesh.

    Args:
        extra: Variables to set in the child.
    """
    dropped = {
        f"{ENVIRONMENT_PREFIX}{name}"
        for name in ("URL", "USERNAME", "PASSWORD", "SITE", "DATA", "IDENTITY_FILE")
    }
    return {name: value for name, value in os.environ.items() if name not in dropped} | extra
