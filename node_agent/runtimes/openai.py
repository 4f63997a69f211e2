"""The ``openai`` runtime: models behind a server of the OpenAI API (Ollama, llama-server, vLLM).

The server is there already, so an instance is no process but a client in the agent's own loop.
"""

import hashlib
import ipaddress
import itertools
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from capability_schemas.capability import ModelInfo
from capability_schemas.errors import ConfigurationError, InvalidTask
from capability_schemas.functions import FunctionSpec
from node_agent.runtimes import base
from node_agent.worker.engines.base import fill_template

_SITE_SUFFIXES = (".local", ".lan", ".internal", ".home.arpa", ".localhost")
"""Ends of names that mean the own site (RFC 6762, RFC 8375, RFC 6761; ``.lan`` by custom)."""

GO_ON = {"continue_final_message": True, "add_generation_prompt": False}
"""What makes vLLM and its kin go on behind the last message; llama-server does so by itself, others
do not (`openai_instance.OpenAIInstance`)."""

_OWN_FIELDS = ("model", "messages", "stream", "stream_options", "input")


class OpenAIOptions(BaseModel):
    """Options of an ``openai`` function.

    Attributes:
        base_url: Address with the version prefix: ``http://127.0.0.1:11434/v1``.
        api_key_file: File of mode 0600 with the key; none is sent without.
        system: System message; ``{text}`` and names of input properties are filled in.
        template: User message, likewise.
        max_tokens: Most tokens of an answer; the server decides when None.
        temperature: 0 is greedy; the server decides when None.
        top_p: Nucleus of the sampling; likewise.
        stop: Texts that end the answer.
        seed: Sampling seed; likewise.
        json_output: Ask for the function's output schema and parse the answer.
        json_form: How the schema is asked for: as OpenAI and vLLM take it (``json_schema``), or
            as llama.cpp and its Python server do (``json_object``).
        confidence: Ask for log probabilities, of which the least becomes the confidence.
        embeddings: Turn texts into vectors (``/v1/embeddings``) in place of a conversation; input
            and output as of the ``embeddings`` runtime.
        extra: Further fields of the request body, as the server takes them.
        connect_s: Longest wait for a connection, seconds.
        first_s: Longest wait for the first words, seconds.
        between_s: Longest silence within an answer, seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: Annotated[str, Field(pattern=r"^https?://[^\s/?#@]+[^\s?#@]*$")]
    api_key_file: Path | None = None
    system: str | None = None
    template: str = "{text}"
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    json_output: bool = False
    json_form: Literal["json_schema", "json_object"] = "json_schema"
    confidence: bool = False
    embeddings: bool = False
    extra: dict[str, Any] = Field(default_factory=dict)
    connect_s: Annotated[float, Field(gt=0, le=600)] = 5.0
    first_s: Annotated[float, Field(gt=0, le=3600)] = 120.0
    between_s: Annotated[float, Field(gt=0, le=3600)] = 30.0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        taken = sorted(self.extra.keys() & set(_OWN_FIELDS))
        if taken:
            raise ValueError(f"extra: {', '.join(taken)} is set by the runtime")
        if self.embeddings and (self.json_output or self.confidence):
            raise ValueError("embeddings: go without json_output and confidence")
        return self


_SERVER_FIELDS = ("base_url", "api_key_file", "connect_s", "first_s", "between_s")
_SAMPLING_FIELDS = ("max_tokens", "temperature", "top_p", "seed")


class OpenAIRuntime:
    """Runs models behind servers of the OpenAI API.

    Args:
        context: What it may use of the node.
    """

    name = "openai"
    chats = True

    def __init__(self, context: base.RuntimeContext) -> None:
        self._context = context
        self._numbers = itertools.count(1)

    def check(self, spec: FunctionSpec) -> None:
        """Check the options, and that the policy admits it where data leaves the site."""
        options = _options(spec)
        where = f"function {spec.name}"
        if not spec.model:
            raise ConfigurationError(f"{where}: an openai function needs the name of a model")
        if options.json_output and spec.output_schema is None:
            raise ConfigurationError(f"{where}: json_output needs an output_schema")
        address = urlsplit(options.base_url)
        host = address.hostname or ""
        if not is_inside(host):
            if not spec.policy.external:
                raise ConfigurationError(
                    f"{where}: {host} is outside the site, and tasks would go there: say"
                    " policy = { external = true }, so that only tasks that may leave come here"
                )
            if options.api_key_file is not None and address.scheme == "http":
                raise ConfigurationError(
                    f"{where}: the API key would travel to {host} in the clear: use https"
                )
        read_key(options.api_key_file, where)

    def group(self, spec: FunctionSpec) -> str:
        """Functions of one model on one server share their instances."""
        server = _options(spec).model_dump(mode="json", include=set(_SERVER_FIELDS))
        concerns = json.dumps([spec.model, spec.concurrency, server], sort_keys=True)
        return f"openai:{hashlib.sha256(concerns.encode()).hexdigest()[:12]}"

    def call_options(self, spec: FunctionSpec) -> dict[str, Any]:
        """Return the prompt and the fields of the request body."""
        options = _options(spec)
        body = {"model": spec.model, **options.extra}
        if options.embeddings:
            return {"embeddings": True, "template": options.template, "body": body}
        sampling = options.model_dump(include=set(_SAMPLING_FIELDS), exclude_none=True)
        body |= sampling
        if options.stop:
            body["stop"] = list(options.stop)
        if options.confidence:
            body["logprobs"] = True
        if options.json_output:
            body["response_format"] = _response_format(spec, options)
        return {
            "system": options.system,
            "template": options.template,
            "parse": options.json_output,
            "body": body,
        }

    def model(self, spec: FunctionSpec, info: dict[str, Any]) -> ModelInfo | None:
        """Name of the model; what weights and engine are behind it, the server does not say."""
        return None if spec.model is None else ModelInfo(name=spec.model, engine="openai")

    async def start(self, spec: FunctionSpec, *, died: base.Died) -> base.Instance:
        """Make a client and see whether the server is there."""
        # Here, so that a node without such functions needs no HTTP client.
        from node_agent.runtimes.openai_instance import OpenAIInstance, Server  # noqa: PLC0415

        options = _options(spec)
        try:
            key = read_key(options.api_key_file, f"function {spec.name}")
        except ConfigurationError as exc:
            raise base.InstanceFailed(exc.message) from exc
        instance = OpenAIInstance(
            name=f"openai-{next(self._numbers)}",
            server=Server(
                base_url=options.base_url.rstrip("/"),
                api_key=key,
                model=str(spec.model),
                connect_s=options.connect_s,
                first_s=options.first_s,
                between_s=options.between_s,
            ),
            slots=spec.concurrency,
            died=died,
        )
        await instance.start()
        return instance


def is_inside(host: str) -> bool:
    """Tell whether a host is of the own site, as far as its name says.

    Loopback, private and link-local addresses are; so are names without a dot and names under the
    suffixes for local use. No name is looked up.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(_SITE_SUFFIXES)
    return address.is_private or address.is_loopback or address.is_link_local


def read_key(path: Path | None, where: str) -> SecretStr | None:
    """Read an API key from its file.

    Raises:
        ConfigurationError: It cannot be read, is empty, or others may read it too.
    """
    if path is None:
        return None
    place = f"{where}: options.api_key_file: {path}"
    try:
        mode = path.stat().st_mode
        key = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not text"
        raise ConfigurationError(f"{place}: {reason}") from exc
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigurationError(f"{place} can be read by others: chmod 600 it")
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigurationError(f"{place} must hold one key and nothing else")
    return SecretStr(key)


def can_go_on(request: base.Request) -> bool:
    """Tell whether an answer that was begun can be asked for from where it is.

    A form (``response_format``) is held against what the server writes, which has to begin at the
    beginning for that; and a given conversation is passed on as it is.
    """
    options = request.options
    return not options.get("messages") and "response_format" not in options["body"]


def request_body(request: base.Request, *, go_on: bool = False) -> dict[str, Any]:
    """Return the body of the request that a call becomes.

    Args:
        request: The call.
        go_on: Whether to hand over what was shown as the beginning of the answer.

    Raises:
        InvalidTask: There is nothing to say to the model.
    """
    options = request.options
    body: dict[str, Any] = dict(options["body"])
    if options.get("embeddings"):
        return {**body, "input": _texts(request)}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    if options.get("tools"):
        body["tools"] = options["tools"]
        body.pop("response_format", None)  # calls have a form of their own
    if options.get("messages"):
        return {**body, "messages": options["messages"]}
    values = _values(request)
    content = fill_template(options["template"], values)
    if not content.strip():
        raise InvalidTask("there is no text for the model", field="text")
    messages = [{"role": "user", "content": content}]
    if options.get("system"):
        system = fill_template(options["system"], values)
        messages.insert(0, {"role": "system", "content": system})
    if go_on:
        messages.append({"role": "assistant", "content": request.shown or ""})
        body |= GO_ON
    return {**body, "messages": messages}


def _texts(request: base.Request) -> list[str]:
    """Return what to turn into vectors: input ``texts`` (a list), or the filled template."""
    given = request.input.get("texts") if isinstance(request.input, Mapping) else None
    if given is None:
        given = [fill_template(request.options["template"], _values(request))]
    if not isinstance(given, list) or not all(isinstance(x, str) and x.strip() for x in given):
        raise InvalidTask("input.texts must be a list of texts, none empty", field="input.texts")
    if not given:
        raise InvalidTask("input.texts is empty", field="input.texts")
    return given


def _values(request: base.Request) -> dict[str, Any]:
    values: dict[str, Any] = dict(request.input) if isinstance(request.input, Mapping) else {}
    if request.text is not None:
        values.setdefault("text", request.text)
    if "text" not in values:
        values["text"] = "" if request.input in (None, {}) else json.dumps(request.input)
    return values


def _response_format(spec: FunctionSpec, options: OpenAIOptions) -> dict[str, Any]:
    if options.json_form == "json_object":
        return {"type": "json_object", "schema": spec.output_schema}
    schema = {"name": spec.name, "schema": spec.output_schema, "strict": True}
    return {"type": "json_schema", "json_schema": schema}


def _options(spec: FunctionSpec) -> OpenAIOptions:
    return base.read_options(OpenAIOptions, spec)
