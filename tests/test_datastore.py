"""The datastore against brute force: order, ranges, longest match, commonest continuations; and what it refuses to read."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cats
from cats.datastore import SORTED_TOKENS, Continuation, Datastore

ABOUT: dict[str, Any] = {"tokenizer": None, "vocabulary": 6, "sources": []}
Texts = list[list[int]]


def texts(seed: int, vocabulary: int = 3, count: int = 12, longest: int = 60) -> Texts:
    """Texts of few words, which repeat themselves and each other."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocabulary, generator.integers(1, longest)).tolist() for _ in range(count)]


def store_of(documents: Texts) -> Datastore:
    return Datastore.build(documents, ABOUT)


def occurrences(documents: Texts, phrase: list[int]) -> list[list[int]]:
    """What stands behind each occurrence of a phrase."""
    size = len(phrase)
    return [text[at + size :] for text in documents for at in range(len(text)) if text[at : at + size] == phrase]


def phrases(documents: Texts, seed: int) -> list[list[int]]:
    """Some that occur, some that do not."""
    generator, found = np.random.default_rng(seed), []
    for _ in range(60):
        text = documents[generator.integers(len(documents))]
        at, size = int(generator.integers(len(text))), int(generator.integers(1, 17))
        found.append(text[at : at + size])
        found.append(generator.integers(0, 3, size).tolist())
    return found


@pytest.mark.parametrize("seed", range(4))
def test_suffixes_stand_in_the_order_of_their_first_tokens(seed: int) -> None:
    documents = texts(seed, vocabulary=2 + 70000 * (seed % 2))
    store = store_of(documents)
    flat = [token for text in documents for token in [*text, -1]]
    assert store.tokens_N.tolist() == flat
    assert store.suffixes_M.tolist() == sorted(
        (place for place, token in enumerate(flat) if token >= 0), key=lambda place: (flat[place : place + SORTED_TOKENS], place)
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_phrase_is_found_wherever_it_stands_and_nowhere_else(seed: int) -> None:
    documents = texts(seed)
    store = store_of(documents)
    for phrase in phrases(documents, seed):
        low, high = store.find(phrase)
        behind = [store.tokens_N[place + len(phrase) : place + len(phrase) + 5].tolist() for place in store.suffixes_M[low:high]]
        found = Counter(tuple(row[: row.index(-1)] if -1 in row else row) for row in behind)
        assert found == Counter(tuple(rest[:5]) for rest in occurrences(documents, phrase))


@pytest.mark.parametrize("seed", range(4))
def test_the_longest_match_is_the_longest(seed: int) -> None:
    documents = texts(seed)
    store = store_of(documents)
    for text in phrases(documents, seed):
        length, low, high = store.longest_match(text, 16, 2)
        standing = [size for size in range(2, min(16, len(text)) + 1) if occurrences(documents, text[-size:])]
        assert length == max(standing, default=0)
        assert high - low == (len(occurrences(documents, text[-length:])) if length else 0)


def brute_force(documents: Texts, phrase: list[int], length: int) -> Counter[tuple[int, ...]]:
    """How often each path follows on the phrase."""
    return Counter(tuple(rest[:size]) for rest in occurrences(documents, phrase) for size in range(1, min(length, len(rest)) + 1))


def paths(nodes: list[Continuation]) -> list[tuple[int, ...]]:
    """Of each node, from the root."""
    found: list[tuple[int, ...]] = []
    for parent, token, _ in nodes:
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


@pytest.mark.parametrize("nodes", [1, 7, 63, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_continuations_are_the_commonest_ones(seed: int, nodes: int) -> None:
    documents = texts(seed)
    store = store_of(documents)
    for phrase in phrases(documents, seed)[:30]:
        expected = brute_force(documents, phrase, 10)
        found = store.continuations((len(phrase), *store.find(phrase)), 10, nodes, 10**6)
        assert all(parent < place for place, (parent, _, _) in enumerate(found))
        assert len(set(paths(found))) == len(found) == min(nodes, len(expected))
        assert [expected[path] for path in paths(found)] == [count for _, _, count in found]
        assert [count for _, _, count in found] == sorted(expected.values(), reverse=True)[:nodes]


def test_of_very_many_matches_those_looked_at_are_spread_evenly() -> None:
    """One in ten goes on with 1, and would never be seen among the first hundred in order."""
    documents = [[7, 1 if number % 10 == 0 else 0] for number in range(3000)]
    found = store_of(documents).continuations((1, *store_of(documents).find([7])), 1, 2, 100)
    assert found == [Continuation(-1, 0, 90), Continuation(-1, 1, 10)]


def test_it_is_mapped_as_it_was_saved(tmp_path: Path) -> None:
    store = store_of(texts(0))
    store.save(tmp_path / "store")
    again = Datastore.open(tmp_path / "store")
    assert isinstance(again.tokens_N, np.memmap)
    assert again.tokens_N.tolist() == store.tokens_N.tolist()
    assert again.suffixes_M.tolist() == store.suffixes_M.tolist()
    assert again.about == ABOUT | {"documents": 12}
    assert again.nbytes == 4 * (len(store.tokens_N) + len(store.suffixes_M))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(cats.CatsError, match="a datastore of no text"):
        store_of([[]])


DAMAGES = {
    "missing": (None, "cannot read the datastore .*No such file"),
    "no header": (lambda whole: b"a page of plain text", "is no datastore"),
    "empty": (lambda whole: b"", "is no datastore"),
    "another safetensors file": (lambda whole: whole.replace(b'"__metadata__"', b'"__nothing____"'), "is no datastore"),
    "another format": (lambda whole: whole.replace(b"datastore 1", b"datastore 9"), "is a cats datastore 9"),
    "cut off": (lambda whole: whole[:-4], "shorter than it says"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    change, sentence = DAMAGES[damage]
    store_of(texts(0)).save(tmp_path / "store")
    if change is None:
        (tmp_path / "store").unlink()
    else:
        (tmp_path / "store").write_bytes(change((tmp_path / "store").read_bytes()))
    with pytest.raises(cats.CatsError, match=sentence):
        Datastore.open(tmp_path / "store")


def test_other_tools_can_read_it(tmp_path: Path) -> None:
    from safetensors import safe_open

    store_of(texts(0)).save(tmp_path / "store")
    with safe_open(tmp_path / "store", "numpy") as file:
        assert json.loads(file.metadata()["about"])["documents"] == 12
        assert file.get_tensor("tokens").dtype == np.int32
