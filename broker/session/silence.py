"""What to say of a broker that was reached and did not let us in: likely causes, likeliest first.

Brokers close a connection, or leave it hanging, without a word. What is known besides decides what
is likely: whether this one has served us before, and whether it is one of a cluster.
"""

from dataclasses import dataclass

from broker.session.settings import BrokerUrl


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of a broker beside its silence.

    Attributes:
        served: Whether it has let us in before: then it is no matter of the port.
        clustered: Whether it is one of several.
    """

    served: bool
    clustered: bool


def why_closed(url: BrokerUrl, known: Known) -> str:
    """Say why a broker may have closed the connection before it answered.

    Args:
        url: Which one.
        known: What is known of it.
    """
    said = f"{url} closed the connection before it let us in"
    causes = ["it starts or stops", "it is of a cluster without a majority"]
    if known.clustered:
        causes.reverse()
    if not known.served and url.path is None:  # a WebSocket was opened: the port is right
        wanted = "wss://" if url.tls else "mqtts:// or ws://"
        causes.insert(1 if known.clustered else 0, f"the port wants {wanted}")
    return f"{said}: perhaps {', or '.join(causes)}"


def why_silent(url: BrokerUrl, known: Known, *, waited_s: float | None) -> str:
    """Say why a broker may have given no answer.

    Args:
        url: Which one.
        known: What is known of it.
        waited_s: How long it had the connection, seconds; None: there was none.
    """
    if waited_s is None:
        return f"{url} cannot be reached in time"
    causes = ["it hangs, or has too much to do"]
    if known.clustered:
        causes.insert(0, "its cluster has no majority")
    if not known.served:
        causes.append("something else than a broker listens there")
    return (
        f"{url} took the connection and gave no answer in {waited_s:g} s: "
        f"perhaps {', or '.join(causes)}"
    )
