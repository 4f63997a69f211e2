"""The contract of the mesh: identifiers, errors, topics, messages, codec and signatures.

Nothing here does I/O or knows asyncio; every other package imports this one and this one imports
none. Each module is one subject:

==============  ==============================================================================
``ids``         identifiers, UUID version 7, the wire clock
``clock``       the wall clock without its steps
``errors``      the error tree, grouped by remedy, with the codes of the wire
``topics``      the topic grammar: build, parse, filter
``wire``        base of all messages, ``encode`` and ``decode`` with size limits
``task``        what a client publishes
``reply``       what a client reads
``capability``  claims of nodes and admitted records of the registry
``node``        presence and load
``invocation``  router to node and back
``admin``       administration, CloudEvents
``enrollment``  join tokens, signing requests, grants
``functions``   declarations of functions; input against schema
``validation``  JSON Schemas of strangers, checked in bounded work
``problem``     what is wrong with a file, with its line
``signing``     canonical bytes and Ed25519
``passport``    whose key a key is, vouched for by the registry
``export``      JSON Schemas and the AsyncAPI document, written from the above
==============  ==============================================================================

A device that publishes plain text is understood like this::

    task = decode_task(b"the pump in hall 3 vibrates at 14 mm/s, what now?")
    topic = Topics(site="local").build(TopicKind.REPLY, client="esp32-1", task="t1", source="r1")
"""

from capability_schemas.errors import ErrorCode, FoamError
from capability_schemas.reply import ReplyEvent, decode_reply
from capability_schemas.task import Task, decode_task
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode, encode

__all__ = [
    "ErrorCode",
    "FoamError",
    "ReplyEvent",
    "Task",
    "TopicKind",
    "Topics",
    "decode",
    "decode_reply",
    "decode_task",
    "encode",
]
