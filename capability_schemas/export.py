"""Written contracts made from the models: a JSON Schema per message and an AsyncAPI 3 document.

``python -m capability_schemas.export`` rewrites ``capability_schemas/schemas/`` and the tables of
``docs/protocol.md``. A test compares the files with what this module makes, so that code and
documents cannot part.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, TypeAdapter

from capability_schemas.admin import AdminRequest, CloudEvent
from capability_schemas.capability import CapabilityClaim, CatalogRecord
from capability_schemas.enrollment import EnrollReply, EnrollRequest
from capability_schemas.errors import ConfigurationError, ErrorCode
from capability_schemas.functions import FunctionSpec
from capability_schemas.invocation import Control, Invocation, Report
from capability_schemas.node import NodeLoad, NodeState, RegistryState, RouterState
from capability_schemas.reply import ReplyEvent
from capability_schemas.task import CancelRequest, ResumeRequest, Task
from capability_schemas.topics import DEFAULT_PREFIX, DEFAULT_SITE, TOPICS, TopicSpec
from capability_schemas.trust import Evidence, TrustState

FOLDER: Final = Path(__file__).parent / "schemas"
PROTOCOL_PAGE: Final = Path(__file__).parents[1] / "docs" / "protocol.md"
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
    "RegistryState": RegistryState,
    "Invocation": Invocation,
    "Control": Control,
    "Report": Report,
    "AdminRequest": AdminRequest,
    "EnrollRequest": EnrollRequest,
    "EnrollReply": EnrollReply,
    "CloudEvent": CloudEvent,
    "TrustState": TrustState,
    "Evidence": Evidence,
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


def _topic_table() -> list[str]:
    rows = ["| topic | written by | QoS | retained | payload |", "|---|---|---|---|---|"]
    for spec in TOPICS.values():
        kept = "yes" if spec.retain else "no"
        row = f"| `{spec.pattern}` | {spec.publishers} | {spec.qos} | {kept} | {spec.payload} |"
        rows.append(row)
    return rows


def _task_table() -> list[str]:
    rows = ["| field | type | default |", "|---|---|---|"]
    for name, field in json_schema("Task", Task)["properties"].items():
        options = field.get("anyOf", [field])
        kind = "/".join(
            str(option.get("type", "object" if "$ref" in option else "any JSON"))
            for option in options
        )
        default = json.dumps(field["default"]) if "default" in field else "none"
        rows.append(f"| `{name}` | {kind} | `{default}` |")
    return rows


_ERROR_MEANINGS: Final[Mapping[ErrorCode, str]] = {
    ErrorCode.INVALID_TASK: "The task is malformed, or its input does not fit the function.",
    ErrorCode.NO_CAPABLE_NODE: "No admitted, living node offers it; `detail.nearest` tells misses.",
    ErrorCode.POLICY_DENIED: "A node could do it, but none may under the task's policy.",
    ErrorCode.UNAUTHORIZED: "The sender may not do this.",
    ErrorCode.TOO_LARGE: "Over a size limit; `detail` holds `size_bytes` and `limit_bytes`.",
    ErrorCode.OVERLOADED: "A bounded queue is full; try again after `retry_after_ms`.",
    ErrorCode.DEADLINE_EXCEEDED: "The time allowed has passed.",
    ErrorCode.CANCELLED: "Ended on request.",
    ErrorCode.NODE_LOST: "The node disappeared: part was shown, or nobody could take over.",
    ErrorCode.EXECUTION_FAILED: "The function itself failed.",
    ErrorCode.INTERNAL: "The mesh failed; its log says more.",
}


def _error_table() -> list[str]:
    rows = ["| code | meaning |", "|---|---|"]
    rows += [f"| `{code}` | {meaning} |" for code, meaning in _ERROR_MEANINGS.items()]
    return rows


def with_tables(page: str) -> str:
    """Return the protocol page with its generated tables up to date.

    Args:
        page: Text holding ``<!-- table: NAME -->`` … ``<!-- end -->`` for each table.

    Raises:
        ConfigurationError: A mark is missing.
    """
    tables = {"topics": _topic_table(), "task": _task_table(), "errors": _error_table()}
    for name, rows in tables.items():
        mark = re.compile(rf"(<!-- table: {name} -->).*?(<!-- end -->)", re.DOTALL)
        if mark.search(page) is None:
            raise ConfigurationError(f"protocol page has no table mark {name!r}")
        body = "\n".join(["", *rows, ""])
        page = mark.sub(lambda found, body=body: found[1] + body + found[2], page)  # type: ignore[misc]  # default argument binds the loop value
    return page


def write() -> None:
    """Write the schemas, removing files no longer made, and the tables of the protocol page."""
    FOLDER.mkdir(exist_ok=True)
    made = documents()
    for stale in FOLDER.glob("*.json"):
        if stale.name not in made:
            stale.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    page = PROTOCOL_PAGE.read_text(encoding="utf-8")
    PROTOCOL_PAGE.write_text(with_tables(page), encoding="utf-8")


if __name__ == "__main__":
    write()
