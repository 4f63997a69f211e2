import numpy as np
import pytest

from capability_schemas.capability import EncoderSpace
from foam.demo.manual import Manual, Passage, read_manual

PASSAGES = (
    Passage("1.1", "Pumps", "Open the valve."),
    Passage("1.1", "Pumps", "Then start it."),
    Passage("2.1", "Fans", "Clean the blades."),
)


class WordEncoder:
    """Vectors over a fixed vocabulary; enough to rank by shared words."""

    words = ("pumps", "fans", "valve", "blades", "start")
    space = EncoderSpace(model="words", revision="1", dimension=6)

    def encode(self, texts):
        rows = np.ones((len(texts), 6), dtype=np.float32) * 0.1
        for row, text in enumerate(texts):
            for place, word in enumerate(self.words):
                rows[row, place] += text.lower().count(word)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_manual_has_sections_with_unique_numbers():
    passages = read_manual()
    titles = {passage.section: passage.title for passage in passages}
    assert 40 <= len(titles) <= 60
    assert len(set(titles.values())) == len(titles)
    assert all(passage.text.endswith((".", "!", "?")) for passage in passages)


def test_search_returns_each_section_once_best_first():
    manual = Manual(passages=PASSAGES, encoder=WordEncoder())
    hits = manual.search("which valve on the pumps", count=5)
    assert [passage.section for _, passage in hits] == ["1.1", "2.1"]
    assert hits[0][1].text == "Open the valve."
    assert hits[0][0] > hits[1][0]


def test_section_is_quoted_as_a_whole():
    manual = Manual(passages=PASSAGES, encoder=WordEncoder())
    assert manual.section("1.1") == "Open the valve. Then start it."


def test_file_without_sections_is_refused(tmp_path):
    path = tmp_path / "manual.md"
    path.write_text("# Only a title\n")
    with pytest.raises(ValueError, match="no sections"):
        read_manual(path)
