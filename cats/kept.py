"""Caches that outlive an answer: of the next prompt, only what differs from the last text is read.

A conversation's next turn then begins sooner by the arithmetic of what it shares with the last text. Under a memory budget its prompt
streams the weights once all the same.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cats.cats_model import MultiAdapterCATSModel
from cats.config import require
from cats.errors import CatsError
from cats.state import DecodeState


class KeptCaches:
    """The `kept` argument of `stream`, `generate` and `chat`: caches of the base and of the method's adapters, for one answer at a time.

    The longest common prefix of the last text and the next prompt stays, whoever wrote it, so earlier turns may be edited or left out; of
    the prompt at least the last token is run. An answer that was given up between two steps leaves what it has; one that failed inside a
    step, nothing. Another method, if it has other adapters or another size of tree, begins with empty caches.

    Without a budget for the whole process caches grow with the text. With one, they are as long as the plan's positions from the first
    answer on, and an answer without them, or with others, takes their place.

    Args:
        model: whose caches they are.
    """

    def __init__(self, model: MultiAdapterCATSModel):
        self._model, self._lent = model, threading.Lock()
        self._state: DecodeState | None = None

    @property
    def tokens(self) -> list[int]:
        """The text whose keys and values are cached; none while an answer uses them."""
        return [] if self._state is None else self._state.tokens[: self._state.cache.length]

    def close(self) -> None:
        """Give the memory back; the next answer begins with empty caches. `CatsError` while an answer uses them."""
        with self._alone():
            if self._state is not None:
                self._state.close()
            self._state = None

    @contextmanager
    def lent(self, adapters: tuple[str, ...], max_nodes: int, prompt: Sequence[int], positions: int) -> Iterator[DecodeState]:
        """For one answer: a state whose caches hold what is known of the prompt.

        Args:
            adapters, max_nodes: of the method.
            positions: that prompt and answer may take.

        Raises:
            CatsError: another answer is using these caches, or the memory plan holds fewer positions or nodes.
        """
        source = self._model.base.source
        with self._alone():
            source.admit(positions, max_nodes)
            last, self._state = self._state, None
            state = self._ready(last, adapters, max_nodes, prompt, positions)
            sound = False
            try:
                yield state
                sound = True
            except GeneratorExit:  # the answer was given up between two steps
                sound = True
                raise
            finally:
                if sound:
                    self._state = state
                    source.rest(self.close)
                    source.answer_ended()
                else:
                    state.close()

    def _ready(
        self, state: DecodeState | None, adapters: tuple[str, ...], max_nodes: int, prompt: Sequence[int], positions: int
    ) -> DecodeState:
        """The last answer's state where it suits the method, else a new one."""
        if state is not None and (tuple(state.adapters), state.max_nodes) == (adapters, max_nodes):
            state.resume(prompt, positions)
            return state
        if state is not None:
            state.close()
        source = self._model.base.source
        return DecodeState(self._model, prompt, adapters, source.plan.demand.positions if source.one_answer else positions, max_nodes)

    def check_model(self, model: MultiAdapterCATSModel) -> None:
        """Raise `CatsError` where these are another model's caches."""
        require(model is self._model, "the kept caches are another model's; make KeptCaches(model) for this one.")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lent.acquire(blocking=False):
            raise CatsError("the kept caches serve an answer that is not finished; end it or close its generator first.")
        try:
            yield
        finally:
            self._lent.release()
