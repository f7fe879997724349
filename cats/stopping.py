"""Stop strings: ends an answer after the token that completes one of them. Knows how to decode; knows no tokenizer."""

from collections.abc import Callable, Sequence

from cats.errors import CatsError

TAIL_TOKENS = 64


class StopStrings:
    """A `stop` argument of `generate`: called with the answer so far and how many of its tokens are new.

    Args:
        strings: any of these ends the answer; the token that completes it is kept.
        decode: token ids -> text.
    """

    def __init__(self, strings: Sequence[str], decode: Callable[[list[int]], str]):
        if not strings or not all(strings):
            raise CatsError("stop strings must not be empty.")
        self._strings, self._decode = tuple(strings), decode
        self._tail = max(TAIL_TOKENS, 8 + max(len(string.encode()) for string in strings))  # a token may be as short as a byte

    def __call__(self, answer: list[int], new: int) -> int | None:
        """The number of tokens to keep, or None to go on."""
        for end in range(len(answer) - new + 1, len(answer) + 1):
            text = self._decode(answer[max(0, end - self._tail) : end])
            if any(string in text for string in self._strings):
                return end
        return None
