"""A simulated device: an outsider that speaks MQTT 3.1.1 and nothing else.

It imports no part of the mesh, only an MQTT client and the standard library, and is run as a script
in a process of its own (``python -I device.py --device pump-7 ...``). It knows what any device
maker can read in the protocol: publish a task to ``{prefix}/{site}/task/{me}``, subscribe
``{prefix}/{site}/reply/{me}/#``, put events in order by ``seq``.

It replays its part of the recording on a faster clock. Credentials come as one JSON line on stdin,
where nobody can read them in a process list; the second line starts the clock. What happens is told
as JSON lines on stdout. Exit status: 0 when every task got a last event in time, 1 otherwise.
"""

import argparse
import gzip
import json
import os
import queue
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

ANSWER_LIMIT_S = 60.0
CONNECT_LIMIT_S = 30.0
MINUTE_S = 60


@dataclass
class Pending:
    """One task that was published, and what has come back.

    Attributes:
        id: Name in the recording.
        sent_s: When, monotonic seconds.
        next_seq: Number of the next event to tell.
        attempt: Newest attempt seen.
        early: Events that came before their turn, by number.
        done: Whether the last event has been told.
    """

    id: str
    sent_s: float
    next_seq: int = 0
    attempt: int = 0
    early: dict[int, dict[str, Any]] = field(default_factory=dict)
    done: bool = False


class Script:
    """The device's part of the recording.

    Args:
        path: ``.jsonl.gz`` file.
        device: Whose tasks to take.
    """

    def __init__(self, path: str, device: str) -> None:
        self.tasks: list[dict[str, Any]] = []
        self._series: dict[tuple[str, str], list[float]] = {}
        self._waves: dict[str, list[float]] = {}
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                if entry["kind"] == "series":
                    self._series[entry["machine"], entry["metric"]] = entry["values"]
                elif entry["kind"] == "waveform":
                    self._waves[entry["name"]] = entry["samples"]
                elif entry["kind"] == "task" and entry["device"] == device:
                    self.tasks.append(entry)

    def data(self, template: Any) -> Any:
        """Put recorded arrays where the template names them."""
        if not isinstance(template, dict):
            return template
        if "$waveform" in template:
            return self._waves[template["$waveform"]]
        if "$series" in template:
            machine, metric, from_s, to_s = template["$series"]
            return self._series[machine, metric][from_s // MINUTE_S : to_s // MINUTE_S]
        return {name: self.data(value) for name, value in template.items()}


class Device:
    """Publishes tasks and follows their answers, on the main thread; its client only queues.

    Args:
        options: Command line.
        script: What to ask, and when.
    """

    def __init__(self, options: argparse.Namespace, script: Script) -> None:
        self._options = options
        self._script = script
        self._root = f"{options.prefix}/{options.site}"
        self._inbox: queue.Queue[dict[str, Any]] = queue.Queue(maxsize=10_000)
        self._pending: dict[str, Pending] = {}
        self._plain: Pending | None = None
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=f"{options.device}-demo",
            protocol=mqtt.MQTTv311,
        )
        self._client.on_connect = self._connected
        self._client.on_subscribe = lambda *_: self._inbox.put({"event": "subscribed"})
        self._client.on_message = self._received
        self._client.on_socket_open = _send_at_once

    def run(self) -> int:
        """Connect, replay, follow; returns the exit status."""
        credentials = json.loads(sys.stdin.readline())
        self._client.username_pw_set(credentials["username"], credentials["password"])
        url = urlsplit(self._options.url)
        self._client.connect(url.hostname or "127.0.0.1", url.port or 1883, keepalive=30)
        self._client.loop_start()
        try:
            self._wait_subscribed()
            tell({"tell": "ready", "device": self._options.device})
            if not sys.stdin.readline():
                return 1  # the conductor is gone
            threading.Thread(target=_end_with_conductor, name="conductor", daemon=True).start()
            return self._replay()
        finally:
            self._client.disconnect()
            self._client.loop_stop()

    def _connected(
        self, client: mqtt.Client, _userdata: Any, _flags: Any, reason: Any, _props: Any
    ) -> None:
        if reason.is_failure:
            self._inbox.put({"event": "refused", "reason": str(reason)})
            return
        client.subscribe(f"{self._root}/reply/{self._options.device}/#", qos=1)

    def _received(self, _client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        event = json.loads(message.payload)
        event["source"] = message.topic.rsplit("/", 1)[-1]
        event["came_s"] = time.monotonic()
        self._inbox.put(event)

    def _wait_subscribed(self) -> None:
        while (event := self._inbox.get(timeout=CONNECT_LIMIT_S))["event"] != "subscribed":
            if event["event"] == "refused":
                raise SystemExit(f"{self._options.device}: the broker refused: {event['reason']}")

    def _replay(self) -> int:
        started_s = time.monotonic()
        waiting = list(self._script.tasks)
        while waiting or not self._settled():
            now_s = time.monotonic()
            due_s = started_s + waiting[0]["at_s"] / self._options.speed if waiting else None
            if due_s is not None and due_s <= now_s and self._may_send(waiting[0]):
                self._send(waiting.pop(0))
                continue
            self._give_up(now_s)
            limit_s = 0.25 if due_s is None else min(max(due_s - now_s, 0.005), 0.25)
            try:
                self._follow(self._inbox.get(timeout=limit_s))
            except queue.Empty:
                continue
        return 0 if all(pending.done for pending in self._pending.values()) else 1

    def _may_send(self, task: dict[str, Any]) -> bool:
        """Bare text carries no id, so only one such task is under way at a time."""
        return not task.get("plain") or self._plain is None

    def _send(self, task: dict[str, Any]) -> None:
        body: dict[str, Any] = {"id": f"{self._options.run}-{task['id']}", "text": task["text"]}
        if "input" in task:
            body["input"] = self._script.data(task["input"])
        payload = task["text"] if task.get("plain") else json.dumps(body, separators=(",", ":"))
        pending = Pending(id=task["id"], sent_s=time.monotonic())
        if task.get("plain"):
            self._plain = pending
        else:
            self._pending[body["id"]] = pending
        tell({"tell": "sent", "task": task["id"], "text": task["text"], "bytes": len(payload)})
        self._client.publish(f"{self._root}/task/{self._options.device}", payload, qos=1)

    def _follow(self, event: dict[str, Any]) -> None:
        pending = self._pending.get(event.get("task", ""))
        if pending is None and self._plain is not None and event["event"] in ("accepted", "error"):
            # The first event that names an unknown task belongs to the bare text sent last.
            pending = self._pending[event["task"]] = self._plain
        if pending is None or pending.done:
            return
        if "seq" not in event:
            self._tell(pending, event)
            return
        attempt = event.get("attempt", 1)
        if attempt < pending.attempt or event["seq"] < pending.next_seq:
            return  # of an attempt that was given up, or told already
        pending.attempt = attempt
        pending.early[event["seq"]] = event
        while (ready := pending.early.pop(pending.next_seq, None)) is not None:
            pending.next_seq += 1
            self._tell(pending, ready)
            if ready["event"] in ("result", "error"):
                pending.done = True
                self._plain = None if self._plain is pending else self._plain

    def _tell(self, pending: Pending, event: dict[str, Any]) -> None:
        after_ms = round((event["came_s"] - pending.sent_s) * 1000, 2)
        shown = {name: value for name, value in event.items() if name != "came_s"}
        tell({"tell": "event", "task": pending.id, "after_ms": after_ms, "event": shown})

    def _settled(self) -> bool:
        return all(pending.done for pending in self._pending.values()) and self._plain is None

    def _give_up(self, now_s: float) -> None:
        late = [
            p for p in self._pending.values() if not p.done and now_s - p.sent_s > ANSWER_LIMIT_S
        ]
        if self._plain is not None and now_s - self._plain.sent_s > ANSWER_LIMIT_S:
            late.append(self._plain)
        if late:
            names = ", ".join(sorted({pending.id for pending in late}))
            raise SystemExit(
                f"{self._options.device}: no answer within {ANSWER_LIMIT_S:g} s to {names}"
            )


def _send_at_once(_client: mqtt.Client, _userdata: Any, sock: Any) -> None:
    """Without this a small packet waits for the peer's delayed acknowledgement, 40 ms and more."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def tell(line: dict[str, Any]) -> None:
    """Write one JSON line to whoever started the device."""
    sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _end_with_conductor() -> None:
    """End when the conductor does, however it dies: its end of the pipe closes then."""
    sys.stdin.read()
    os._exit(1)  # nobody is left to hear of it, and the broker publishes no will of ours


def main() -> int:
    """Run one device."""
    parser = argparse.ArgumentParser(description="A simulated device of the demo plant.")
    parser.add_argument("--device", required=True, help="name in the recording and on the broker")
    parser.add_argument("--url", required=True, help="mqtt://host:port")
    parser.add_argument("--recording", required=True, help="recording to replay (.jsonl.gz)")
    parser.add_argument("--prefix", default="foam/v1")
    parser.add_argument("--site", default="local")
    parser.add_argument("--run", default="demo", help="start of the task ids, new for every run")
    parser.add_argument(
        "--speed", type=float, default=1500.0, help="seconds of the shift in one second"
    )
    options = parser.parse_args()
    return Device(options, Script(options.recording, options.device)).run()


if __name__ == "__main__":
    raise SystemExit(main())
