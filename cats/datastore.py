"""A text to look things up in: token ids, and the places of its suffixes in the order of what stands there.

One safetensors file holds both, and is mapped, not read: a look-up pages in what it touches. Suffixes are sorted by their first
`SORTED_TOKENS` tokens, which is further than a match and its continuation reach, so that places with the same beginning lie side by side:
finding a phrase is a binary search, and so is counting it. Knows arrays and files; knows no tokenizer and no model.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from cats.errors import CatsError
from cats.files import write_atomically

SORTED_TOKENS = 32
SEPARATOR = -1
"""Stands behind every document: no phrase holds it, and no continuation goes beyond it."""
MOST_TOKENS = 2**31 - 1
FORMAT = "cats datastore 1"
STORED = {"I32": np.dtype("<i4")}
Report = Callable[[str], object]
Document = Sequence[int] | np.ndarray
"""Token ids of one text."""


class Continuation(NamedTuple):
    """One node of a trie: its parent's place in the list (-1: the root), its token, and how many of the places go on so."""

    parent: int
    token: int
    places: int


@dataclass(frozen=True)
class Datastore:
    """See the module.

    Attributes:
        tokens_N: int32 ids of all documents, a `SEPARATOR` behind each.
        suffixes_M: int32 places in `tokens_N`, in the order of the tokens there; those of separators are left out.
        about: "tokenizer" (its fingerprint, None where that is not known), "vocabulary" (number of ids), "documents", "sources".
    """

    tokens_N: np.ndarray
    suffixes_M: np.ndarray
    about: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of memory, when every page has been used."""
        return int(self.tokens_N.nbytes + self.suffixes_M.nbytes)

    @classmethod
    def build(cls, documents: "Iterable[Document]", about: dict[str, Any], report: Report = lambda what: None) -> "Datastore":
        """Of token ids; `report` is called with what is being done.

        About 50 bytes of memory are needed for every token. Raises `CatsError` where there is no token, or too many.
        """
        pieces = [np.append(np.asarray(document, dtype=np.int32), np.int32(SEPARATOR)) for document in documents if len(document)]
        if not pieces:
            raise CatsError("a datastore of no text would find nothing; give files that hold some.")
        tokens_N = np.concatenate(pieces)
        if len(tokens_N) > MOST_TOKENS:
            raise CatsError(f"the text has {len(tokens_N)} tokens, and a datastore holds at most {MOST_TOKENS}; give fewer files.")
        suffixes_N = sorted_suffixes(tokens_N, report)
        return cls(tokens_N, suffixes_N[len(pieces) :].astype(np.int32), {**about, "documents": len(pieces)})

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        tensors = {"tokens": self.tokens_N, "suffixes": self.suffixes_M}
        metadata = {"format": FORMAT, "about": json.dumps(self.about)}
        write_atomically(path, lambda part: save_file(tensors, part, metadata))

    @classmethod
    def open(cls, path: Path) -> "Datastore":
        """Map a file that `save` wrote; anything else raises `CatsError`."""
        header, data = read_header(path)
        try:
            if header["__metadata__"]["format"] != FORMAT:
                raise CatsError(f"{path} is a {header['__metadata__']['format']}, and this reads a {FORMAT}; build it again.")
            about = json.loads(header["__metadata__"]["about"])
            tokens_N, suffixes_M = (mapped(path, header[name], data) for name in ("tokens", "suffixes"))
        except (KeyError, TypeError, ValueError) as error:
            raise CatsError(f"{path} is no datastore; build one with training.build_datastore.") from error
        return cls(tokens_N, suffixes_M, about)

    def find(self, phrase: Sequence[int]) -> tuple[int, int]:
        """The range of `suffixes_M` whose places begin with `phrase`, which is no longer than `SORTED_TOKENS`."""
        tokens_N, wanted = self.tokens_N, list(phrase)

        def beginning(place: int) -> list[int]:
            begin = int(place)
            tokens: list[int] = tokens_N[begin : begin + len(wanted)].tolist()
            return tokens

        low = bisect_left(self.suffixes_M, wanted, key=beginning)
        return low, bisect_right(self.suffixes_M, wanted, lo=low, key=beginning)

    def longest_match(self, text: Sequence[int], longest: int, shortest: int) -> tuple[int, int, int]:
        """How many last tokens of `text`, from `longest` down to `shortest`, stand together somewhere in the store, and their range.

        Where a phrase stands, its end stands too, so the length is found by halving. (0, 0, 0) where not even the shortest stands.
        """
        match, low, high = (0, 0, 0), shortest, min(longest, len(text))
        while low <= high:
            length = (low + high + 1) // 2
            begin, end = self.find(text[-length:])
            if begin < end:
                match, low = (length, begin, end), length + 1
            else:
                high = length - 1
        return match

    def continuations(self, match: tuple[int, int, int], length: int, nodes: int, most: int) -> list[Continuation]:
        """What follows on a match of `longest_match`, as a trie: its `nodes` commonest nodes, a parent in front of its children.

        Args:
            length: tokens looked at behind each place; match and continuation together reach no further than `SORTED_TOKENS`.
            most: places looked at; of more, so many that are spread evenly over the range, and so over what follows there.
        """
        phrase, low, high = match
        places = self.suffixes_M[low:high]
        if len(places) > most:
            places = places[np.linspace(0, len(places), most, endpoint=False).astype(np.int64)]
        index_PC = places[:, None].astype(np.int64) + np.arange(phrase, phrase + length)
        rows_PC = self.tokens_N[np.minimum(index_PC, len(self.tokens_N) - 1)]
        return commonest(np.where(np.minimum.accumulate(rows_PC, axis=1) < 0, SEPARATOR, rows_PC), nodes)


def commonest(rows_PC: np.ndarray, nodes: int) -> list[Continuation]:
    """The commonest nodes of the trie of sorted rows, a parent in front of its children; between equals, the one nearer to the root.

    A node is a stretch of rows with the same first tokens; a row ends at its first `SEPARATOR`.
    """
    count, length = rows_PC.shape
    if count == 0 or length == 0:
        return []
    begins_PC = np.ones((count, length), dtype=bool)
    begins_PC[1:] = np.logical_or.accumulate(rows_PC[1:] != rows_PC[:-1], axis=1)
    first = [np.flatnonzero(begins_PC[:, depth]) for depth in range(length)]
    row = np.concatenate(first)
    depth = np.repeat(np.arange(length), [len(rows) for rows in first])
    size = np.concatenate([np.diff(rows, append=count) for rows in first])
    real = rows_PC[row, depth] != SEPARATOR
    row, depth, size = row[real], depth[real], size[real]
    chosen = np.lexsort((row, depth, -size))[:nodes]
    stretch_PC = begins_PC.cumsum(axis=0)
    place: dict[tuple[int, int], int] = {}
    trie: list[Continuation] = []
    for row_, depth_, size_ in zip(row[chosen].tolist(), depth[chosen].tolist(), size[chosen].tolist(), strict=True):
        parent = place[depth_ - 1, int(stretch_PC[row_, depth_ - 1])] if depth_ else -1
        place[depth_, int(stretch_PC[row_, depth_])] = len(trie)
        trie.append(Continuation(parent, int(rows_PC[row_, depth_]), size_))
    return trie


def sorted_suffixes(tokens_N: np.ndarray, report: Report = lambda what: None) -> np.ndarray:
    """All places of `tokens_N`, int64, in the order of the `SORTED_TOKENS` tokens there; between equals the earlier place.

    Doubling (Manber and Myers 1990): from the ranks of all stretches of w tokens follow those of 2 w, a pair of ranks each.
    """
    rank_N, width = tokens_N.astype(np.int64) - SEPARATOR, 1
    order_N = np.arange(len(tokens_N))
    while width < SORTED_TOKENS:
        report(f"sorting by {2 * width} tokens")
        pair_N = rank_N * (int(rank_N.max()) + 2)
        pair_N[:-width] += rank_N[width:] + 1  # what reaches beyond the end is smaller than anything
        order_N = np.argsort(pair_N, kind="stable")
        ordered_N = pair_N[order_N]
        new_N = np.zeros(len(tokens_N), dtype=np.int64)
        np.cumsum(ordered_N[1:] != ordered_N[:-1], out=new_N[1:])
        rank_N[order_N] = new_N
        width *= 2
    return order_N


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the byte at which its data begin; `CatsError` where it has none."""
    size_bytes = 8
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(size_bytes), "little")
            room = path.stat().st_size - size_bytes
            header = json.loads(file.read(length)) if 2 <= length <= room else None
    except OSError as error:
        raise CatsError(f"cannot read the datastore {path}: {error.strerror}; build one with training.build_datastore.") from error
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise CatsError(f"{path} is no datastore; build one with training.build_datastore.")
    return header, size_bytes + length


def mapped(path: Path, entry: dict[str, Any], data: int) -> np.ndarray:
    """An array of one dimension in a safetensors file; an entry that does not fit the file raises `ValueError` or the like."""
    begin, end = entry["data_offsets"]
    dtype, (length,) = STORED[entry["dtype"]], entry["shape"]
    if end - begin != length * dtype.itemsize or data + end > path.stat().st_size or length < 1:
        raise CatsError(f"{path} is shorter than it says or damaged; build it again.")
    return np.memmap(path, dtype, "r", data + begin, (length,))
