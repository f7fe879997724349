"""What of a growing answer may be shown: however it is cut into pieces, the same text as of the whole."""

import random

import pytest
from transformers import PreTrainedTokenizerBase

from cats.serve.reply import Piece, Visible
from cats.text import GrowingText, ModelText, load_tokenizer
from tests.answering_server import TINY
from tests.speaking_model import byte_tokenizer

STOPS = ((), ("ab",), ("aab", "b b"), ("\n\n", " c"), ("abca",))


def shown(text: str, stops: tuple[str, ...], cuts: random.Random) -> tuple[str, list[str]]:
    """The text as it is shown in the end, and how much of it was after every piece."""
    visible, so_far, stages = Visible(stops), "", []
    while text:
        size = cuts.randint(0, 4)
        so_far += "".join(piece.text for piece in visible.add(Piece(text[:size], "draft")))
        stages.append(so_far)
        text = text[size:]
    return so_far + "".join(piece.text for piece in visible.end()), stages


@pytest.mark.parametrize("stops", STOPS, ids=str)
def test_the_text_is_cut_at_the_first_stop_and_stripped(stops: tuple[str, ...]) -> None:
    choices = random.Random(0)
    for _ in range(2000):
        text = "".join(choices.choices("abc \n", k=choices.randint(0, 14)))
        ends = [place for stop in stops if (place := text.find(stop)) >= 0]
        expected = text[: min(ends, default=len(text))].strip()
        found, stages = shown(text, stops, choices)
        assert found == expected
        assert all(expected.startswith(stage) for stage in stages)


def test_pieces_keep_their_writers() -> None:
    visible = Visible(("stop",))
    pieces = [Piece(" one", "draft"), Piece(" two", "sibling"), Piece(" st", "lookup"), Piece("ill st", "target"), Piece("op", "draft")]
    seen = [visible.add(piece) for piece in pieces]
    assert seen[:3] == [[Piece("one", "draft")], [Piece(" two", "sibling")], []]
    assert seen[3:] == [[Piece(" st", "lookup"), Piece("ill", "target")], []]
    assert visible.add(Piece("more", "draft")) == visible.end() == []


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), load_tokenizer(TINY)], ids=["bytes", "tiny"])
def test_text_that_grows_is_the_text_of_all_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    choices, decode = random.Random(1), ModelText(tokenizer).decode
    texts = ["na\u00efve caf\u00e9 \u20ac 5", "\u4f60\u597d \u4e16\u754c", "  two  spaces\n\n", "\U0001f680\U0001f680 go", ""]
    streams: list[list[int]] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    streams += [[choices.randrange(3, len(tokenizer)) for _ in range(30)] for _ in range(50)]
    for ids in streams:
        growing = GrowingText(decode)
        parts = [growing.add(token) for token in ids]
        assert "".join(parts) + growing.end() == decode(ids)
        if "\ufffd" not in decode(ids):
            assert all(decode(ids[:place]).startswith("".join(parts[:place])) for place in range(len(ids)))
