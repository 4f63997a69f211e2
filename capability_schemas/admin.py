"""Administration, and the events components publish about themselves."""

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from capability_schemas.errors import InvalidTask, MalformedPayload
from capability_schemas.ids import Identifier
from capability_schemas.passport import Passport
from capability_schemas.wire import Count, WireModel, decode

ADMIN_LIMIT_BYTES: Final = 64 * 1024


class AdminRequest(WireModel):
    """A verb for a router or registry; answered by a ``result`` or ``error`` reply event.

    Attributes:
        id: Chosen by the client; the task level of the reply topic.
        verb: What to do.
        args: Arguments of the verb.
        sender: Who asks, when it signs.
        client: Level ``{client}`` of the topic, where it is not the sender: at a broker whose
            users have other names.
        target: Who is asked.
        sent_at: When it was sent, UTC milliseconds.
        passport: Whose key signs it.
        signature: Of the sender, Ed25519 over the canonical bytes. Optional: a target that trusts
            its broker takes a request without. The ``id`` is what tells a repetition.
    """

    id: Identifier
    verb: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z_]{0,31}$")]
    args: dict[str, Any] = Field(default_factory=dict)
    sender: Identifier | None = None
    client: Identifier | None = None
    target: Identifier | None = None
    sent_at: Count | None = None
    passport: Passport | None = None
    signature: str | None = None


def decode_admin_request(payload: bytes) -> AdminRequest:
    """Turn what an administrator published into a request.

    Args:
        payload: Raw bytes, at most 64 KiB.

    Raises:
        TooLarge: Longer than that.
        InvalidTask: Malformed, or a field is missing or of the wrong type; ``detail`` names it.
    """
    try:
        return decode(AdminRequest, payload, limit_bytes=ADMIN_LIMIT_BYTES)
    except MalformedPayload as error:
        raise InvalidTask(error.message, **error.detail) from error


class CloudEvent(BaseModel):
    """An event in the structured JSON form of CloudEvents 1.0.2.

    Attributes:
        id: Unique for the source.
        source: URI reference of the component, ``/foam/{site}/{id}``.
        type: ``io.foam.`` and what happened, with a version.
        time: RFC 3339.
        subject: What it is about.
        data: Fields of the event.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    specversion: Literal["1.0"] = "1.0"
    id: str
    source: str
    type: str
    time: str
    subject: str | None = None
    datacontenttype: str = "application/json"
    data: dict[str, Any] = Field(default_factory=dict)
