"""A short run of the fuzzer over every reader; the long one is ``fuzz_decoders.py``."""

import random

from security.fuzz_decoders import bend, fuzz, targets


def test_no_reader_crashes_and_no_change_passes():
    counts = fuzz(seed=2026, cases=20_000)
    assert sum(cases for cases, _ in counts.values()) == 20_000
    # A fuzzer whose cases are all refused at the first byte, or never, would find nothing.
    for name in ("Task", "NodeState", "proof", "claim, signed"):
        cases, refused = counts[name]
        assert cases > 500, name
        assert refused or name == "claim, signed", name


def test_sound_messages_are_read():
    for name, payload, read in targets():
        read(payload)
        assert payload, name


def test_bending_changes_something():
    bent = [bend(b'{"a":1}', b"xyz", random.Random(seed)) for seed in range(50)]
    assert sum(one != b'{"a":1}' for one in bent) > 40
