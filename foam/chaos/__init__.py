"""Breaks a running mesh on purpose, and tells from what its clients saw whether it kept its word.

`judge` reads what arrives at the clients; it also judges simulations (`foam.simulation`).
"""

from foam.chaos.judge import Ask, Breach, Judge, Verdict

__all__ = ["Ask", "Breach", "Judge", "Verdict"]
