"""Written contracts made from the models: a JSON Schema per message and an AsyncAPI 3 document.

``python -m capability_schemas.export`` rewrites ``capability_schemas/schemas/``. A test compares
the files with what this module makes, so that code and documents cannot part.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, TypeAdapter

from capability_schemas.admin import AdminRequest, CloudEvent, EnrollReply, EnrollRequest
from capability_schemas.capability import CapabilityClaim, CatalogRecord
from capability_schemas.functions import FunctionSpec
from capability_schemas.invocation import Control, Invocation, Report
from capability_schemas.node import NodeLoad, NodeState, RouterState
from capability_schemas.reply import ReplyEvent
from capability_schemas.task import CancelRequest, ResumeRequest, Task
from capability_schemas.topics import DEFAULT_PREFIX, DEFAULT_SITE, TOPICS, TopicSpec

FOLDER: Final = Path(__file__).parent / "schemas"
ASYNCAPI: Final = "asyncapi.json"

MESSAGES: Final[Mapping[str, type[BaseModel] | TypeAdapter[Any]]] = {
    "Task": Task,
    "CancelRequest": CancelRequest,
    "ResumeRequest": ResumeRequest,
    "ReplyEvent": TypeAdapter(ReplyEvent),
    "CapabilityClaim": CapabilityClaim,
    "CatalogRecord": CatalogRecord,
    "NodeState": NodeState,
    "NodeLoad": NodeLoad,
    "RouterState": RouterState,
    "Invocation": Invocation,
    "Control": Control,
    "Report": Report,
    "AdminRequest": AdminRequest,
    "EnrollRequest": EnrollRequest,
    "EnrollReply": EnrollReply,
    "CloudEvent": CloudEvent,
}
"""Every message with a JSON payload, by the name the topic table uses."""


def json_schema(name: str, model: type[BaseModel] | TypeAdapter[Any]) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of one message.

    Args:
        name: Message name, the file stem of its ``$id``.
        model: Its class, or an adapter for a union.
    """
    schema = model.json_schema() if isinstance(model, TypeAdapter) else model.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:foam:v1:{name}",
        "title": name,
        **{key: value for key, value in schema.items() if key != "title"},
    }


def _channel(spec: TopicSpec) -> dict[str, Any]:
    channel: dict[str, Any] = {
        "address": "{prefix}/{site}/" + spec.pattern,
        "description": f"Written by: {spec.publishers}.",
        "parameters": {
            "prefix": {"default": DEFAULT_PREFIX, "description": "Leading levels"},
            "site": {"default": DEFAULT_SITE, "description": "Site of the mesh"},
            **{name: {"description": f"Identifier of the {name}"} for name in spec.variables},
        },
        "bindings": {"mqtt": {}},
    }
    name = spec.payload if spec.payload in MESSAGES else "Binary"
    channel["messages"] = {name: {"$ref": f"#/components/messages/{name}"}}
    return channel


def asyncapi() -> dict[str, Any]:
    """Return the AsyncAPI 3.0 document of the wire protocol."""
    components = {
        name: {
            "name": name,
            "contentType": "application/json",
            "payload": {"$ref": f"{name}.json"},
        }
        for name in MESSAGES
    }
    components["Binary"] = {"name": "Binary", "contentType": "application/octet-stream"}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "FOAM wire protocol",
            "version": "1.0.0",
            "description": "Federation Of Agents over MQTT; docs/protocol.md explains it.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {kind.value: _channel(spec) for kind, spec in TOPICS.items()},
        "operations": {
            kind.value: {
                "action": "send",
                "channel": {"$ref": f"#/channels/{kind.value}"},
                "bindings": {"mqtt": {"qos": spec.qos, "retain": spec.retain}},
            }
            for kind, spec in TOPICS.items()
        },
        "components": {"messages": components},
    }


def documents() -> dict[str, str]:
    """Return every generated file: name to text."""
    made: dict[str, dict[str, Any]] = {
        f"{name}.json": json_schema(name, model) for name, model in MESSAGES.items()
    }
    made["FunctionSpec.json"] = json_schema("FunctionSpec", FunctionSpec)
    made[ASYNCAPI] = asyncapi()
    return {
        name: json.dumps(value, indent=2, sort_keys=False) + "\n" for name, value in made.items()
    }


def write(folder: Path = FOLDER) -> None:
    """Write every document into ``folder``, removing files that are no longer made."""
    folder.mkdir(exist_ok=True)
    made = documents()
    for stale in folder.glob("*.json"):
        if stale.name not in made:
            stale.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
