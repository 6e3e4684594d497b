"""Makes clip_bpe.json: a small CLIP vocabulary, and what an independent tokenizer of CLIP's kind makes of some texts.

Nothing but Python's standard library is used, so that the answers do not come from the library under test. The rules
are those of CLIP's own tokenizer: Unicode in composed form, white space as single spaces, lower case, text cut into
contractions, runs of letters, single digits and runs of anything else, bytes as letters, the last one marked with
`</w>`, and pairs joined in the order of the merges.

    python3 tests/vectors/make_clip_bpe.py > tests/vectors/clip_bpe.json
"""

import json
import unicodedata
from collections import Counter

START, END, LAST = "<|startoftext|>", "<|endoftext|>", "</w>"
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
CORPUS = """a woman speaks to the camera, a man speaks calmly. the person is talking and smiling in a bright room.
it's they've we'll don't i'm he'd you're the there then their high-quality realistic natural authentic lens-fixed
café naïve über 2024 日本語 日本"""
MERGES = 120
TEXTS = [
    "",
    " \t\n ",
    "A woman speaks to the camera.",
    "Authentic, Realistic, Natural, High-quality, Lens-Fixed, A man IS talking.",
    "It's  they've\tWE'LL 'S x's don't i'm",
    "rock'n'roll 'tis!!!'sup ''s",
    "café CAFÉ cafe\u0301 naïve ÜBER u\u0308ber",
    "2024 3.14 ½ ²³ Ⅻ １２",
    "日本語 日本語日本 中文，字。",
    "امرأة تتحدث ไทย\u0e34 ক\u09cdষ",
    "👩🏽\u200d🚀🗣\ufe0f!? 🇪🇪",
    "\u00a0no\u2003break\u2028line\u0085next",
    "a<|endoftext|>b <|startoftext|>",
    "ﬁ ﷺ \u212b \u1100\u1161\u11a8 𝒜\ufffd\U0010ffff",
    "snake_case a_b -- ~~ <b>",
]


def letters() -> dict[int, str]:
    """A printable letter for every byte, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


LETTERS = letters()


def kind(char: str) -> str:
    """What a character counts as when text is cut."""
    if char.isspace():
        return "space"
    category = unicodedata.category(char)[0]
    return category if category in "LN" else "other"


def words(text: str) -> list[str]:
    """Cuts a text; white space goes."""
    found, at = [], 0
    while at < len(text):
        contraction = next((c for c in CONTRACTIONS if text.startswith(c, at)), None)
        if contraction:
            found.append(contraction)
            at += len(contraction)
            continue
        what, end = kind(text[at]), at + 1
        while what in ("L", "other") and end < len(text) and kind(text[end]) == what:
            end += 1
        if what != "space":
            found.append(text[at:end])
        at = end
    return found


def clean(text: str) -> str:
    """Composed form, single spaces, lower case."""
    text = unicodedata.normalize("NFC", text)
    single = "".join(" " if char.isspace() else char for char in text)
    while "  " in single:
        single = single.replace("  ", " ")
    return "".join(char.lower() for char in single)


def pieces(word: str) -> list[str]:
    """A word's bytes as letters, the last one marked."""
    marked = [LETTERS[byte] for byte in word.encode()]
    return [*marked[:-1], marked[-1] + LAST]


def join(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Joins a pair wherever it stands, from the left."""
    joined, at = [], 0
    while at < len(parts):
        if tuple(parts[at : at + 2]) == pair:
            joined.append(parts[at] + parts[at + 1])
            at += 2
        else:
            joined.append(parts[at])
            at += 1
    return joined


def learn() -> list[tuple[str, str]]:
    """The most frequent pairs of the corpus, one after the other."""
    corpus = [pieces(word) for word in words(clean(CORPUS))]
    merges = []
    while len(merges) < MERGES:
        pairs = Counter(pair for parts in corpus for pair in zip(parts, parts[1:], strict=False))
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        corpus = [join(parts, best) for parts in corpus]
    return merges


def main() -> None:
    """Prints vocabulary, merges, and the tokens of every text."""
    merges = learn()
    tokens = [*LETTERS.values(), *(letter + LAST for letter in LETTERS.values())]
    tokens += ["".join(pair) for pair in merges] + [START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    assert len(vocab) == len(tokens)
    ranks = {pair: rank for rank, pair in enumerate(merges)}

    def tokenize(text: str) -> list[int]:
        ids = []
        while text:
            # The special tokens are found before anything else is done to the text.
            at, special = min(((text.find(s), s) for s in (START, END) if s in text), default=(len(text), ""))
            for word in words(clean(text[:at])):
                parts = pieces(word)
                while pairs := [pair for pair in zip(parts, parts[1:], strict=False) if pair in ranks]:
                    parts = join(parts, min(pairs, key=ranks.__getitem__))
                ids += [vocab[part] for part in parts]
            ids += [vocab[special]] if special else []
            text = text[at + len(special) :]
        return [vocab[START], *ids, vocab[END]]

    cases = [{"text": text, "ids": tokenize(text)} for text in TEXTS]
    document = {"vocab": vocab, "merges": [" ".join(pair) for pair in merges], "cases": cases}
    print(json.dumps(document, ensure_ascii=True, separators=(",", ":")))


main()
