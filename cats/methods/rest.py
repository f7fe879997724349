"""REST (He et al. 2023): a text on the disk proposes what stands in it behind the longest match of the last tokens. No model drafts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

from cats.config import MethodConfig, require
from cats.datastore import SORTED_TOKENS, Datastore
from cats.errors import CatsError
from cats.methods.base import Method, Needs, Preset
from cats.planning.cost import Passes, Work

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from cats.cats_model import MultiAdapterCATSModel
    from cats.state import Cycle

NO_DATASTORE = "the method rest looks things up in a datastore; give --datastore FILE (training.build_datastore makes one)."
MATCHES = 5000
"""Places of a match whose continuations are counted; of more, so many of them, spread evenly."""


@dataclass(frozen=True)
class RestConfig(MethodConfig):
    """REST: the last tokens, at most `longest_match` of them, found in the datastore, and the commonest of what follows on them there."""

    datastore: Path | None = field(default=None, metadata={"help": "file to look up in; training.build_datastore makes one of any text"})
    longest_match: int = field(default=16, metadata={"help": "last tokens that are looked up first", "lowest": 1})
    shortest_match: int = field(default=2, metadata={"help": "last tokens that must be found at least", "lowest": 1})
    continuation: int = field(default=10, metadata={"help": "tokens taken from behind the match", "lowest": 1})
    total_tokens: int = field(default=64, metadata={"help": "nodes of the tree, root included", "lowest": 2})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.shortest_match <= self.longest_match,
            f"shortest-match is {self.shortest_match} and longest-match {self.longest_match}; exchange them.",
        )
        require(
            self.longest_match + self.continuation <= SORTED_TOKENS,
            f"longest-match {self.longest_match} and continuation {self.continuation} reach further than the {SORTED_TOKENS} tokens "
            "by which a datastore is sorted; make one of them smaller.",
        )

    def work(self, passes: Passes, exits: tuple[int, ...], layers: int, nodes: float) -> Work:
        """See `MethodConfig`; looking up is not priced."""
        return passes.target(nodes, layers)

    @property
    def found_datastore(self) -> Path:
        """The datastore's place; `CatsError` where none was given."""
        if self.datastore is None:
            raise CatsError(NO_DATASTORE)
        return self.datastore


class Rest(Method):
    """A text on the disk proposes what followed there on the last tokens: a trie of its commonest continuations."""

    name = "rest"
    Config = RestConfig
    presets = {"rest": Preset(RestConfig(), "REST")}
    config: RestConfig
    resources: Datastore | None

    @classmethod
    def needs(cls, config: RestConfig) -> Needs:
        """See `Method`: the datastore, as large as its file."""
        return Needs(resident_bytes=0 if config.datastore is None else Datastore.open(config.datastore).nbytes, own=("a datastore",))

    @classmethod
    def lacks(cls, config: RestConfig, base: "PretrainedConfig", coarse: str | None = None) -> str | None:
        """See `Method`: a datastore."""
        return NO_DATASTORE if config.datastore is None else None

    @classmethod
    def open(cls, model: "MultiAdapterCATSModel", config: RestConfig) -> Datastore:
        """See `Method`; a datastore of another tokenizer's ids raises `CatsError`."""
        path = config.found_datastore
        store = Datastore.open(path)
        ours, theirs = model.tokenizer_fingerprint, store.about["tokenizer"]
        if None not in (ours, theirs) and ours != theirs:
            raise CatsError(
                f"the datastore {path} was built with another tokenizer than this model's, so its numbers are other words; "
                "build one with training.build_datastore and this model's --model-path."
            )
        if store.about["vocabulary"] > model.base.config.vocab_size:
            raise CatsError(
                f"the datastore {path} holds token ids up to {store.about['vocabulary'] - 1} and this model knows "
                f"{model.base.config.vocab_size}; build one with this model's tokenizer."
            )
        return store

    @property
    def max_nodes(self) -> int:
        """See `Method`."""
        return self.config.total_tokens

    def propose(self, cycle: "Cycle") -> Sequence[int]:
        """See `Method`. Scores are the shares of the matches that go on so."""
        store, config, tree = self.resources, self.config, cycle.tree
        if store is None:
            raise CatsError(f"the datastore of the method {self.name} was not opened; make the method with build_method(config, model).")
        with cycle.stage("lookup"):
            match = store.longest_match(cycle.state.tokens, config.longest_match, config.shortest_match)
            length = min(config.continuation, cycle.depth_limit)
            nodes, counts = [0], [min(match[2] - match[1], MATCHES)]
            for parent, token, count in store.continuations(match, length, config.total_tokens - 1, MATCHES):
                nodes.append(tree.add(nodes[parent + 1], token, "lookup", log(count / counts[parent + 1])))
                counts.append(count)
        return nodes
