"""The proxy of the chaos suite, for tests that break connections."""

from foam.chaos.proxy import TcpProxy

__all__ = ["TcpProxy"]
