"""The words of a text in Windows-1252: whether they are such as the languages of Western Europe have.

Any bytes are letters in Windows-1252, so a file in Windows-1250, -1251 or -1254 is read too, with other letters.
"""

import re
from dataclasses import dataclass

_WORD = re.compile(rb"[A-Za-z\x8a\x8c\x8e\x9a\x9c\x9e\x9f\xaa\xba\xc0-\xd6\xd8-\xf6\xf8-\xff]+")
_ALPHABETS = tuple(
    frozenset(letters)
    for letters in (
        "àâçèéêëîïôœùûüÿ",  # French, Albanian
        "äöüßéèêç",  # German
        "áéíóúñü",  # Spanish, Irish
        "áâãàçéêíóôõúü",  # Portuguese
        "àçèéíïòóúüñ",  # Catalan
        "àèéìíîòóùúá",  # Italian, Scottish Gaelic
        "æøåéóòôêü",  # Danish, Norwegian
        "åäöéüõšžáè",  # Swedish, Finnish, Estonian
        "áéíóúýðþæöø",  # Icelandic, Faroese
        "áäéëèêïíóöúüçâôû",  # Dutch, Welsh
    )
)
"""The letters beyond ASCII that a word of each language may have."""
_ICELANDIC, _ICELANDIC_TOO = frozenset("ðþý"), frozenset("áíóúæ")
"""What Icelandic and Faroese alone have (Turkish has ğ, ş and ı there), and what these two have as often."""


@dataclass
class WesternWords:
    """What was seen of the words beyond ASCII, as the blocks of a file come."""

    sample: str = ""
    """The first of them."""
    odd: str = ""
    """The first that no language has, with its line."""
    _n_lines: int = 1
    _icelandic: str = ""
    _n_icelandic: int = 0
    _n_icelandic_too: int = 0

    def add(self, block: bytes) -> None:
        """Look at the next block; a word that goes on in another is looked at in two parts."""
        for match in () if block.isascii() else _WORD.finditer(block):
            if not match[0].isascii():
                self._add_word(match[0].decode("cp1252"), block, match.start())
        self._n_lines += block.count(b"\n")

    def _add_word(self, word: str, block: bytes, start: int) -> None:
        letters = {letter for letter in word.rstrip("ªº").lower() if not letter.isascii()}
        is_odd = not any(alphabet.issuperset(letters) for alphabet in _ALPHABETS)
        is_icelandic = bool(letters & _ICELANDIC)
        self.sample = self.sample or word
        self._n_icelandic += is_icelandic
        self._n_icelandic_too += bool(letters & _ICELANDIC_TOO)
        if (is_odd and not self.odd) or (is_icelandic and not self._icelandic):
            line = self._n_lines + block.count(b"\n", 0, start)
            place = f"{word!r:.40} in line {line:,}"
            if is_odd and not self.odd:
                self.odd = place
            if is_icelandic and not self._icelandic:
                self._icelandic = place

    @property
    def complaint(self) -> str:
        """A word that speaks against Windows-1252 and its line, or nothing."""
        is_turkish = 4 * self._n_icelandic_too < self._n_icelandic
        return self.odd or (self._icelandic if is_turkish else "")
