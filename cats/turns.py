"""Whose turn it is on a model that several threads share: one step at a time, and one answer at a time where memory is granted for one.

A model has one work space, one ring of streamed weights and one set of rotary tables, so a step (the prompt's pass, or
propose, verify and commit) runs alone. Between two steps nothing is held, and answers of several threads interleave. A
budget for the whole process grants caches and activations for one answer: there the next answer waits for the first to
end. Both queues are first come, first served. Knows threads; knows no model.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cats.errors import CatsError


@dataclass(eq=False)
class Place:
    """A place in a queue, and the thread that stood there last (an answer's steps may be asked for by different threads)."""

    thread: int


class Turns:
    """The two queues of one model.

    Args:
        one_answer: whether an answer waits for the one before it.
    """

    def __init__(self, one_answer: bool) -> None:
        self._one_answer = one_answer
        self._changed = threading.Condition()
        self._answers: list[Place] = []
        self._steps: list[Place] = []

    @contextmanager
    def answer(self) -> Iterator[Place | None]:
        """For as long as an answer's caches live; raises `CatsError` where this thread would wait for an answer of its own."""
        if not self._one_answer:
            yield None
            return
        refusal = (
            "another answer of this thread is not finished, and the memory budget grants caches for one answer at a time; "
            "end it or close its generator first, or load the model with a budget that covers the weights only."
        )
        with self._turn(self._answers, refusal) as place:
            yield place

    @contextmanager
    def step(self, answer: Place | None) -> Iterator[None]:
        """For one step of `answer`; raises `CatsError` inside another step of the same thread."""
        if answer is not None:
            answer.thread = threading.get_ident()
        with self._turn(self._steps, "a step of this model was begun inside another one; ask it for the next step when that has ended."):
            yield

    @contextmanager
    def _turn(self, queue: list[Place], refusal: str) -> Iterator[Place]:
        place = Place(threading.get_ident())
        with self._changed:
            if any(other.thread == place.thread for other in queue):
                raise CatsError(refusal)
            queue.append(place)
        try:
            with self._changed:
                self._changed.wait_for(lambda: queue[0] is place)
            yield place
        finally:
            with self._changed:
                queue.remove(place)
                self._changed.notify_all()
