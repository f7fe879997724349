"""REST: its trie in the engine, text that stands in the store at once, bytes in the ledger, and stores that do not fit the model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import cats
from cats.datastore import Datastore
from cats.methods import method_of
from cats.methods.rest import Rest, RestConfig
from cats.settings import as_record
from tests.datastores import store_of
from tests.scripted_model import follow, scripted_model
from tests.tiny_models import VOCAB, TinyModel, prompts

CONFIG = cats.GenerationConfig(max_new_tokens=40, eos_token_ids=())
Tiny = Callable[[str], TinyModel]


def plain(model: cats.MultiAdapterCATSModel, prompt: list[int]) -> list[int]:
    return cats.generate(model, prompt, cats.build_method(cats.AutoregressiveConfig(), model), CONFIG).ids


def saved(path: Path, documents: list[list[int]], tokenizer: str | None = None, vocabulary: int = VOCAB) -> Path:
    Datastore.build(documents, {"tokenizer": tokenizer, "vocabulary": vocabulary, "sources": []}).save(path)
    return path


def test_a_text_that_stands_in_the_store_is_accepted_ten_tokens_at_a_time(tiny: Tiny, tmp_path: Path) -> None:
    model, prompt = cats.load(tiny("llama-grouped").base, dtype="float64"), prompts(count=1, longest=20, seed=5)[0]
    expected = plain(model, prompt)
    noise = prompts(count=20, longest=40, seed=6)
    config = RestConfig(saved(tmp_path / "store", [*noise, prompt + expected]), longest_match=8)
    found = cats.generate(model, prompt, cats.build_method(config, model), CONFIG)
    assert found.ids == expected
    assert max(trace.accepted for trace in found.traces) == config.continuation
    assert {kind for trace in found.traces for kind in trace.accepted_kinds} == {"lookup"}
    assert all(trace.seconds["lookup"] > 0 for trace in found.traces[1:])


@pytest.mark.parametrize("seed", range(3))
def test_text_and_noise_give_the_plain_answer(tiny: Tiny, tmp_path: Path, seed: int) -> None:
    """Half true stores: every answer stands in it with some tokens changed."""
    model = cats.load(tiny("llama").base, dtype="float64")
    asked = prompts(count=3, longest=15, seed=seed)
    answers = [prompt + plain(model, prompt) for prompt in asked]
    documents = [[token if (place + seed) % 7 else 9 for place, token in enumerate(answer)] for answer in answers]
    config = RestConfig(saved(tmp_path / "store", documents), total_tokens=12)
    for prompt, answer in zip(asked, answers, strict=True):
        found = cats.generate(model, prompt, cats.build_method(config, model), CONFIG)
        assert prompt + found.ids == answer
        assert 0 < sum(trace.accepted for trace in found.traces) < sum(trace.nodes - 1 for trace in found.traces)


def test_the_tree_holds_what_follows_most_often() -> None:
    """The store goes on with t + 1 three times out of five, t + 2 and t + 3 once each: of three nodes two are one chain."""
    circle = follow([(token + 1) % 8 for token in range(8)])
    model = scripted_model(circle, circle, circle)
    config = RestConfig(store_of(8), longest_match=1, shortest_match=1, total_tokens=3)
    traces = cats.generate(model, [0], cats.build_method(config, model), CONFIG).traces[1:-2]
    assert {(trace.nodes, trace.accepted) for trace in traces} == {(3, 2)}


def test_where_nothing_matches_the_root_goes_alone(tmp_path: Path) -> None:
    circle = follow([(token + 1) % 8 for token in range(8)])
    model = scripted_model(circle, circle, circle)
    config = RestConfig(saved(tmp_path / "store", [[0, 2, 4], [1, 1]], vocabulary=8))
    assert {trace.nodes for trace in cats.generate(model, [0], cats.build_method(config, model), CONFIG).traces} == {1}


def test_its_bytes_stand_in_the_ledger(tiny: Tiny, tmp_path: Path) -> None:
    config = RestConfig(saved(tmp_path / "store", prompts(count=400, longest=400, seed=1)))
    nbytes = Datastore.open(tmp_path / "store").nbytes
    assert Rest.needs(config).resident_bytes == nbytes
    model = cats.load(tiny("llama").base)
    before = model.base.source.ledger.total
    method = cats.build_method(config, model)
    assert cats.build_method(config, model).resources is method.resources
    taken = sum(model.base.source.ledger.taken.values())
    model.close()
    assert taken - sum(model.base.source.ledger.taken.values()) == nbytes
    assert before <= taken


def test_the_text_side_must_be_the_stores(speaking: TinyModel, tmp_path: Path) -> None:
    model = cats.load(speaking.base)
    ours = saved(tmp_path / "ours", [[5, 6, 7]], model.text.fingerprint)
    cats.build_method(RestConfig(ours), model)
    theirs = saved(tmp_path / "theirs", [[5, 6, 7]], "of another tokenizer")
    with pytest.raises(cats.CatsError, match="was built with another tokenizer than this model's"):
        cats.build_method(RestConfig(theirs), model)


def test_ids_that_the_model_does_not_know_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    store = saved(tmp_path / "store", [[5, 6, 70]], vocabulary=71)
    with pytest.raises(cats.CatsError, match=r"holds token ids up to 70 and this model knows 48"):
        cats.build_method(RestConfig(store), cats.load(tiny("llama").base))


def test_large_vocabularies_are_served(tmp_path: Path) -> None:
    """Ids beyond 65,536, as int32."""
    ids = [70_000, 128_000, 70_001, 70_000, 128_000, 70_002]
    store = Datastore.open(saved(tmp_path / "store", [ids], vocabulary=150_000))
    found = store.continuations(store.longest_match([1, 70_000, 128_000], 16, 2), 1, 10, 10)
    assert sorted(node.token for node in found) == [70_001, 70_002]


REFUSED = {
    "no datastore": ({"datastore": None}, "looks things up in a datastore; give --datastore"),
    "a missing one": ({"datastore": Path("nowhere")}, "cannot read the datastore nowhere"),
    "a match of nothing": ({"shortest_match": 0}, "shortest-match is 0"),
    "an empty range": ({"shortest_match": 5, "longest_match": 4}, "exchange them"),
    "further than it is sorted": ({"longest_match": 30}, "reach further than the 32 tokens"),
    "a tree of the root": ({"total_tokens": 1}, "total-tokens is 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(tiny: Tiny, case: str) -> None:
    changed, sentence = REFUSED[case]
    with pytest.raises(cats.CatsError, match=sentence):
        cats.build_method(replace(RestConfig(store_of(8)), **changed), cats.load(tiny("llama").base))  # type: ignore[arg-type]


def test_its_record_names_the_datastore() -> None:
    config = RestConfig(store_of(8))
    assert method_of(as_record(config)) == config
