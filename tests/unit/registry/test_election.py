"""The lease of the registries, case by case; `tests/property` has the rest."""

import pytest

from registry.election import DRIFT, Election, Mode, Word

LEASE = 1_000.0


def election(own="registry-2", *others):
    made = Election(own=own, epoch=10, lease_ms=LEASE, others=others)
    made.connect(0.0)
    return made


def say_and_hear(made, now):
    """Have it say a word, and the word come back at once."""
    word = made.speak(now)
    made.hear(word, now)
    return word


def lead(made, now=0.0):
    """Have one that is alone lead."""
    say_and_hear(made, now)
    assert made.look(now)
    say_and_hear(made, now)
    assert made.leads(now)


def word(registry="registry-1", term=5, beat=1, *, leads=True, epoch=3, leaves=False):
    return Word(registry, term, epoch, beat, leads, leaves)


def test_one_without_others_leads_when_it_has_heard_itself_twice():
    made = election()
    assert not made.look(0.0) or made.mode is Mode.FOLLOWING
    lead(made)
    assert made.leader == "registry-2"


def test_the_lease_runs_from_when_a_word_was_sent():
    made = election()
    lead(made)
    heard_late = made.speak(400.0)
    assert not made.leads(LEASE)
    made.hear(heard_late, 990.0)
    assert made.leads(LEASE + 399)
    assert not made.leads(LEASE + 400)


def test_a_lost_connection_ends_the_writing_until_a_word_has_come_back():
    made = election()
    lead(made)
    made.disconnect()
    assert not made.leads(1.0)
    made.connect(2.0)
    assert not made.leads(2.0)
    say_and_hear(made, 3.0)
    assert made.leads(3.0)


def test_one_that_never_was_heard_may_lead_for_a_lease():
    made = election("registry-2", "registry-1")
    say_and_hear(made, 0.0)
    assert made.mode is Mode.FOLLOWING
    modes = []
    for now in (LEASE, LEASE * (1 + DRIFT)):
        made.look(now)
        modes.append(made.mode)
    assert modes == [Mode.FOLLOWING, Mode.CLAIMING]


def test_who_says_that_it_follows_is_not_waited_for():
    made = election("registry-1", "registry-2")
    say_and_hear(made, 0.0)
    made.hear(word("registry-2", term=0, leads=False), 1.0)
    assert made.look(2.0)
    say_and_hear(made, 2.0)
    made.hear(word("registry-2", term=made.term, beat=2, leads=False), 3.0)
    made.look(3.0)
    assert made.leads(3.0)


@pytest.mark.parametrize("how", ["silence", "will"])
def test_a_lease_is_waited_out_from_the_last_word(how):
    made = election()
    say_and_hear(made, 0.0)
    made.hear(word(), 100.0)
    if how == "will":
        made.lose("registry-1")
    over, now = 100.0 + LEASE * (1 + DRIFT), 100.0
    while not made.leads(now):
        now += 50.0
        if made.look(now):
            say_and_hear(made, now)
        assert now < 5 * LEASE
    assert now >= over
    if how == "will":
        assert now <= over + 100.0  # it had claimed meanwhile


def test_a_goodbye_hands_over_at_once():
    made = election()
    say_and_hear(made, 0.0)
    made.hear(word(), 100.0)
    made.hear(word(beat=2, leads=False, leaves=True), 150.0)
    now = 150.0
    while not made.leads(now):
        now += 50.0
        if made.look(now):
            say_and_hear(made, now)
    assert now < 150.0 + LEASE / 2


def test_a_kept_goodbye_is_no_promise():
    made = election("registry-2", "registry-1")
    say_and_hear(made, 0.0)
    made.hear(word(leads=False, leaves=True), 1.0, kept=True)
    now = 1.0
    while not made.leads(now):
        now += 50.0
        if made.look(now):
            say_and_hear(made, now)
    assert now >= LEASE * (1 + DRIFT)


@pytest.mark.parametrize("leads", [True, False])
def test_whoever_hears_of_a_higher_term_yields_and_says_so(leads):
    made = election()
    lead(made)
    assert made.hear(word(term=made.term + 1, leads=leads), 1.0)
    assert not made.leads(1.0)
    said = made.speak(1.0)
    assert not said.leads
    assert said.term == made.term


def test_in_one_term_the_first_id_counts():
    first, second = election("registry-1"), election("registry-2")
    lead(first)
    lead(second)
    assert first.term == second.term
    first.hear(second.speak(1.0), 1.0)
    second.hear(first.speak(1.0), 1.0)
    assert first.leads(1.0)
    assert not second.leads(1.0)


def test_repeated_and_older_words_change_nothing():
    made = election()
    say_and_hear(made, 0.0)
    made.hear(word(beat=5, leads=False), 1.0)
    for old in (word(beat=5), word(beat=4), word(term=4, beat=9)):
        made.hear(old, 2.0)
    assert made.leader is None


def test_a_restart_with_a_clock_set_back_is_heard_by_its_term():
    made = election()
    made.hear(word(term=5, epoch=100, beat=50), 0.0)
    made.hear(word(term=6, epoch=20, beat=1), 1.0)
    assert made.leader == "registry-1"
    assert made.term == 6


def test_its_own_words_of_an_earlier_start_are_not_an_echo():
    made = election()
    made.hear(Word("registry-2", 7, 3, 1, True), 0.0, kept=True)
    made.look(0.0)
    assert made.mode is Mode.FOLLOWING
    assert made.term == 7
    assert made.hear(Word("registry-2", 7, 99, 1, True), 0.0, kept=True)
    assert made.speak(0.0).epoch == 100  # later than any that others know


def test_one_that_is_heard_and_does_not_hear_gives_way():
    made = election()
    lead(made)
    now, said = 0.0, []
    while now < 4 * LEASE:
        now += 100.0
        if made.look(now):
            said.append(made.speak(now))
    assert not said[-1].leads
    assert not made.leads(now)
    say_and_hear(made, now)
    assert made.look(now)
    assert made.speak(now).leads


def test_a_pause_of_its_own_is_not_taken_for_the_silence_of_others():
    made = election()
    say_and_hear(made, 0.0)
    made.look(1.0)
    made.hear(word(), 2.0)
    made.look(10 * LEASE)  # it was stopped: what others said waits to be read
    assert made.mode is Mode.FOLLOWING


def test_a_least_term_is_kept_to():
    made = election()
    say_and_hear(made, 0.0)
    made.look(0.0, least_term=1_000)
    assert made.term == 1_000
