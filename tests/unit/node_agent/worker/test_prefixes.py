"""Which sequence takes a prompt."""

from node_agent.worker.engines.prefixes import Sequence, common, place


def sequence(number, tokens="", *, session=None, used=0, busy=False):
    return Sequence(number, [ord(c) for c in tokens], session, used, busy)


def ids(text):
    return [ord(c) for c in text]


def placed(sequences, text, session=None, **given):
    found = place(sequences, ids(text), session, **given)
    assert found is not None
    source = None if found.source is None else found.source.number
    return found.target.number, source, found.shared


def test_a_common_beginning_is_counted_to_the_first_difference():
    assert common(ids("abcd"), ids("abxd")) == 2
    assert common(ids("ab"), ids("abxd")) == 2
    assert common([], ids("ab")) == 0


def test_without_anything_in_common_an_empty_sequence_is_taken_and_then_the_oldest():
    held = [sequence(0, "xyz", used=1), sequence(1)]
    assert placed(held, "abcdef") == (1, None, 0)
    held = [sequence(0, "xyz", used=5), sequence(1, "uvw", used=2)]
    assert placed(held, "abcdef") == (1, None, 0)


def test_a_session_goes_on_where_it_was():
    held = [sequence(0, "prefix-one", session="a", used=9), sequence(1, "prefix-two", session="b")]
    assert placed(held, "prefix-xyz", "a") == (0, 0, 7)
    assert placed(held, "prefix-xyz", "b") == (1, 1, 7)


def test_what_a_prompt_simply_continues_is_continued_in_place():
    assert placed([sequence(0, "abcd"), sequence(1)], "abcdefg", "new") == (0, 0, 4)


def test_another_sessions_memory_is_copied_and_stays():
    held = [sequence(0, "system. first", session="a", used=3), sequence(1, "other", used=1)]
    assert placed(held, "system. second", "b") == (1, 0, 8)


def test_a_running_sequence_can_be_copied_but_not_taken():
    held = [sequence(0, "system. first", busy=True), sequence(1)]
    assert placed(held, "system. second") == (1, 0, 8)


def test_a_copy_must_be_worth_it():
    held = [sequence(0, "system. first", busy=True), sequence(1)]
    assert placed(held, "system. second", least_copied=9) == (1, None, 0)
    assert placed([sequence(0, "abX", busy=True), sequence(1)], "abcdef") == (1, None, 0)


def test_a_single_sequence_keeps_what_it_can():
    assert placed([sequence(0, "abXX", session="a")], "abcd", "b") == (0, 0, 2)


def test_the_last_token_of_a_prompt_is_always_decoded():
    assert placed([sequence(0, "abcd")], "abcd") == (0, 0, 3)


def test_there_is_no_place_while_all_are_busy():
    assert place([sequence(0, busy=True)], ids("ab"), None) is None
