"""Settings of the registry."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class RegistrySettings(BaseModel):
    """Limits and intervals of the registry.

    Attributes:
        claim_limit_bytes: longest claim looked at.
        pending_limit: claims that may wait to be embedded; further ones are refused.
        grace_s: after a connection, or a new start of a node, how long a record may go without its
            claim being heard again before it is withdrawn as a ghost, seconds.
        sweep_interval_s: how often leases and graces are looked at, seconds.
        retry_first_s: wait after the first failure of the store, doubled with each further one.
        retry_cap_s: longest such wait.
        history_per_capability: entries of the history kept for each key.
        given_similarity: least cosine of an embedding that a claim brings to our own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    claim_limit_bytes: Annotated[int, Field(ge=1024)] = 256 * 1024
    pending_limit: Annotated[int, Field(ge=1)] = 10_000
    grace_s: Annotated[float, Field(gt=0)] = 30.0
    sweep_interval_s: Annotated[float, Field(gt=0)] = 0.5
    retry_first_s: Annotated[float, Field(gt=0)] = 0.5
    retry_cap_s: Annotated[float, Field(gt=0)] = 30.0
    history_per_capability: Annotated[int, Field(ge=1)] = 100
    given_similarity: Annotated[float, Field(ge=-1, le=1)] = 0.95
