from typing import TYPE_CHECKING

import numpy as np
import pytest

from registry.encoders import Encoder, OnnxEncoder, SentenceTransformerEncoder
from registry.vectors import capability_texts, centroid
from support.encoders import WordEncoder, exported_folder
from support.plant_fleet import FUNCTIONS, IN_SCOPE, OUT_OF_SCOPE

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.encoder

TEXTS = [text for text, _ in IN_SCOPE] + OUT_OF_SCOPE


@pytest.fixture(scope="module")
def onnx() -> OnnxEncoder:
    return OnnxEncoder(exported_folder())


@pytest.fixture(scope="module")
def reference() -> SentenceTransformerEncoder:
    return SentenceTransformerEncoder()


@pytest.fixture(scope="module", params=["onnx", "sentence_transformers", "words"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    make: dict[str, Callable[[], Encoder]] = {
        "onnx": lambda: request.getfixturevalue("onnx"),
        "sentence_transformers": lambda: request.getfixturevalue("reference"),
        "words": WordEncoder,
    }
    return make[request.param]()


class TestEveryEncoder:
    def test_gives_unit_rows_of_its_space(self, encoder: Encoder) -> None:
        rows = encoder.encode(["pump 7 overheats", "x", "größer als 90 °C", "泵 7 过热"])
        assert rows.shape == (4, encoder.space.dimension)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)

    def test_gives_no_rows_for_no_texts(self, encoder: Encoder) -> None:
        assert encoder.encode([]).shape == (0, encoder.space.dimension)

    def test_takes_empty_and_very_long_texts(self, encoder: Encoder) -> None:
        rows = encoder.encode(["", "pump " * 5_000])
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)

    def test_gives_the_same_vector_again(self, encoder: Encoder) -> None:
        first, again = encoder.encode([TEXTS[0]]), encoder.encode([TEXTS[0]])
        np.testing.assert_array_equal(first, again)

    def test_puts_paraphrases_nearer_than_other_requests(self, encoder: Encoder) -> None:
        asked, near, far = encoder.encode(
            ["turn on the kitchen light", "switch the kitchen light on", "what is a good film"]
        )
        assert asked @ near > asked @ far + 0.2

    def test_names_its_space_with_a_revision(self, encoder: Encoder) -> None:
        assert encoder.space.model
        assert encoder.space.revision


class TestServingAgainstReference:
    def test_vectors_point_the_same_way(
        self, onnx: OnnxEncoder, reference: SentenceTransformerEncoder
    ) -> None:
        cosines = np.sum(onnx.encode(TEXTS) * reference.encode(TEXTS), axis=1)
        assert cosines.mean() >= 0.98
        assert cosines.min() >= 0.95

    def test_ranks_capabilities_alike(
        self, onnx: OnnxEncoder, reference: SentenceTransformerEncoder
    ) -> None:
        asked = [text for text, _ in IN_SCOPE]
        best = []
        for encoder in (onnx, reference):
            offered = np.vstack(
                [
                    centroid(
                        encoder.encode(capability_texts(each.name, each.description, each.examples))
                    )
                    for each in FUNCTIONS
                ]
            )
            best.append((encoder.encode(asked) @ offered.T).argmax(axis=1))
        assert np.mean(best[0] == best[1]) >= 0.95

    def test_spaces_differ_and_name_the_same_model(
        self, onnx: OnnxEncoder, reference: SentenceTransformerEncoder
    ) -> None:
        assert onnx.space.model == reference.space.model
        assert onnx.space != reference.space

    def test_a_vector_does_not_depend_on_its_company(self, onnx: OnnxEncoder) -> None:
        alone = np.vstack([onnx.encode([text]) for text in TEXTS[:8]])
        np.testing.assert_array_equal(alone, onnx.encode(TEXTS[:8]))
