"""The contract of a method: it grows a tree. The engine verifies, accepts and commits.

A method is one file of cats/methods/ (docs/adding_a_method.md): defining its class makes its flags, its presets and its tests.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from cats.acceptance import Verdict
from cats.config import MethodConfig, require
from cats.errors import ContractError
from cats.planning.plan import View

if TYPE_CHECKING:  # what flags need loads no transformers
    from transformers import PretrainedConfig

    from cats.cats_model import MultiAdapterCATSModel
    from cats.state import Cycle, DecodeState

METHODS: dict[str, type[MethodConfig]] = {}
"""The configuration of every method, by the method's name."""
CLASSES: dict[str, type["Method"]] = {}
PRESETS: dict[str, MethodConfig] = {}
"""Configurations under short names, of all methods."""
TITLES: dict[str, str] = {}
"""What tables call the presets."""


@dataclass(frozen=True)
class Preset:
    """Settings under a short name, and what tables call them."""

    config: MethodConfig
    title: str


@dataclass(frozen=True)
class Needs:
    """What a method asks of a model beside its own code.

    Attributes:
        adapters: by name.
        views: of the model that it drafts with; under a budget, what they multiply by is resident.
        resident_bytes: of what its `open` will hold; a budget grants them.
        own: what it reads beside the model and its adapters, in words ("a datastore"), given or not.
    """

    adapters: tuple[str, ...] = ()
    views: tuple[View, ...] = ()
    resident_bytes: int = 0
    own: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """Everything, one by one."""
        own = self.own or (("weights of its own",) if self.resident_bytes else ())
        return (*(f"{name} adapter" for name in self.adapters), *(view.label for view in self.views), *own)


class Method(ABC):
    """Proposes; never loops over tokens, never touches a cache.

    What a method can ask for, all through `Cycle`: run nodes to an exit (`advance`) and read an adapter there
    (`adapter_logits`), draft with another view of the model (`target_logits` with a `View`), add query rows that cannot be accepted
    (`tree.add_probe`). What it gets back: `observe`, and what each pass has cost in `cycle.passes`.

    An object serves one answer at a time, and is made for little. A class with a `name` of its own registers itself; one without is an
    abstract helper. The first line of its docstring is what --list-methods says of it.

    Attributes:
        name: for --method.
        Config: its settings; a configuration belongs to one method.
        presets: settings under short names; None given: the default settings under the method's name.
        shapes: small settings that every parametrised test runs; none given: those of the presets.
        guarantee: what holds of its text, in a line.
        adapters: names of the adapters that it reads, whatever its settings; see `needs`.
        config, resources, model: its settings, what `open` made, and for which model; None where it was built without one.
    """

    name: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    presets: ClassVar[Mapping[str, Preset]] = {}
    shapes: ClassVar[Mapping[str, MethodConfig]] = {}
    guarantee: ClassVar[str] = "lossless"
    adapters: tuple[str, ...] = ()
    config: MethodConfig
    resources: Any = None
    model: "MultiAdapterCATSModel | None" = None

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "name" in cls.__dict__:
            register(cls)

    def __init__(self, config: MethodConfig, resources: Any = None):
        self.config, self.resources = config, resources
        self.adapters = self.needs(config).adapters

    def check_model(self, model: "MultiAdapterCATSModel") -> None:
        """Raise `CatsError` where this method needs what it would hold of `model`, and has it not."""
        holds = type(self).open.__func__ is not Method.open.__func__  # type: ignore[attr-defined]
        ready = not holds or self.model is model or (self.model is None and self.resources is not None)
        built = "for another model" if self.model is not None else "without a model"
        advice = "use build_method(config, model)"
        require(ready, f"the method {type(self).__name__} holds something of its model and was built {built}; {advice}.")

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """What this method needs with these settings; asked before anything is loaded."""
        return Needs(cls.adapters)

    @classmethod
    def lacks(cls, config: Any, base: "PretrainedConfig", coarse: str | None = None) -> str | None:
        """What is missing for this method to run with a base model of this configuration, as a sentence; None: nothing.

        Asked before anything is loaded, of files that `open` would read. Commands that run every method leave out what lacks something.

        Args:
            coarse: the copy that loading will make (`MemoryOptions.coarse`).
        """
        return None

    @classmethod
    def open(cls, model: "MultiAdapterCATSModel", config: Any) -> Any:
        """What the method holds as long as the model lives: heads, a datastore, what it has learnt. None: nothing.

        Called once per model and configuration. What it returns is a module, a tensor, a container of these, or anything that says its
        size in `nbytes`; a method `close`, where it has one, is called when the model closes.
        """
        return None

    @property
    @abstractmethod
    def max_nodes(self) -> int:
        """Upper bound of tree nodes in a step, root included; caches are sized by it. Follows from the settings alone."""

    def start(self, state: "DecodeState") -> None:  # noqa: B027 - most methods remember nothing
        """A new answer begins; the prompt is in the caches. Forget everything about the last one."""

    @abstractmethod
    def propose(self, cycle: "Cycle") -> Sequence[int]:
        """Grow `cycle.tree`; return the nodes to verify.

        The nodes are distinct and in ascending order (so a parent comes before its children), begin with the root and hold the parent of
        each of them; probes among them come back in `observe` but are never accepted. No node, probes included, lies deeper than
        `cycle.depth_limit`. What breaks this raises `ContractError`, as a bug of the method. Time may be charged to stages of any name
        by `cycle.stage`.
        """

    def observe(  # noqa: B027 - nor learn
        self, cycle: "Cycle", nodes: Sequence[int], logits_TV: torch.Tensor, verdict: Verdict
    ) -> None:
        """After verification, before the commit: the target's logits at `nodes`, the tree, the verdict."""


def register(cls: type[Method]) -> None:
    """Enter a method under its name; raises `ContractError` where the name, a preset or the configuration is another method's."""
    config_class = cls.Config
    if METHODS.get(cls.name, config_class) is not config_class:
        raise ContractError(f"the method {cls.__name__} is called {cls.name}, as another one is; rename it.")
    if config_class.__dict__.get("name", cls.name) != cls.name:
        raise ContractError(f"{config_class.__name__} belongs to the method {config_class.name}; give {cls.name} a class of its own.")
    config_class.name = cls.name
    cls.presets = dict(cls.presets) or {cls.name: Preset(config_class(), cls.name.replace("_", " "))}
    cls.shapes = dict(cls.shapes) or {name: preset.config for name, preset in cls.presets.items()}
    for name, preset in cls.presets.items():
        if PRESETS.get(name, preset.config).name != cls.name:
            raise ContractError(f"the preset {name} of the method {cls.name} is {PRESETS[name].name}'s already; rename it.")
        PRESETS[name], TITLES[name] = preset.config, preset.title
    METHODS[cls.name], CLASSES[cls.name] = config_class, cls
