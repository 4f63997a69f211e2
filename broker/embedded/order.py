"""What the embedded engine tells its child process."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from broker.engine import EngineSettings


class ServerOrder(BaseModel):
    """What the engine tells its child; holds no secret.

    Attributes:
        settings: How to run the broker.
        credentials: Path of the credentials file.
        site: Site of the topics that access rules are made for.
        prefix: Their prefix.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: EngineSettings
    credentials: Path
    site: str
    prefix: str
