"""TLS handshakes in memory."""

import ssl


def handshake(
    server: ssl.SSLContext, client: ssl.SSLContext, host: str = "broker.test"
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Shake hands; returns the server's side and the client's, or raises what one side raised."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    here = server.wrap_bio(to_server, to_client, server_side=True)
    there = client.wrap_bio(to_client, to_server, server_hostname=host)
    waiting = [there, here]
    for _ in range(10):
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                continue
        if not waiting:
            return here, there
    raise AssertionError("the handshake did not end")
