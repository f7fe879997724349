"""The ledger of a memory budget: what each part was granted, what it has taken. It refuses; it never warns."""

import ctypes
from collections.abc import Callable, Sequence
from functools import partial

import psutil

from cats.errors import CatsError
from cats.planning.plan import LIBRARIES, PREFILL_ROWS, MemoryPlan, amount

GROWTH = 96_000_000
"""Bytes granted to the interpreter beyond what it holds before loading: threads, work spaces of matrix libraries, code paged in later."""


def mapped_bytes() -> int:
    """What this process holds of mapped files: the code of its libraries, as far as it has been used; 0 where the system does not say."""
    return int(getattr(psutil.Process().memory_info(), "shared", 0))


LARGE = 1 << 20
"""Bytes from which a block of memory is had from the system and given back to it, where the C library can be told."""
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Parameters of glibc's mallopt."""


def give_back_freed_memory() -> None:
    """Let the process hold what is in use: glibc otherwise keeps up to 64 MB of what was freed, which no ledger can know."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.mallopt(MMAP_THRESHOLD, LARGE)
        library.mallopt(TRIM_THRESHOLD, LARGE)
        library.malloc_trim(0)


def interpreter_bytes() -> int:
    """What this process holds now, libraries included, and what it will still grow by itself."""
    return int(psutil.Process().memory_info().rss) + GROWTH


class Ledger:
    """Grants by name, from a plan, and what is taken of each."""

    def __init__(self, plan: MemoryPlan):
        self.plan = plan
        self.granted = dict(plan.charges) | dict(plan.device_charges)
        self._on_device = {name for name, _ in plan.device_charges}
        self.taken: dict[str, int] = {}
        self._mapped = mapped_bytes()
        self.charge(LIBRARIES, plan.demand.interpreter_bytes and plan.demand.interpreter_bytes - GROWTH)

    def charge(self, name: str, nbytes: int) -> None:
        """Take `nbytes` of what `name` was granted (below 0: give them back); raises `CatsError` where that is exceeded.

        What a budget of weights does not count is noted, and has no limit.
        """
        taken = self.taken.get(name, 0) + nbytes
        counted = self.plan.budget_bytes is not None and (self.plan.covers == "process" or name in self.granted)
        limited = name in self._on_device or counted
        if limited and taken > self.granted.get(name, 0):
            raise CatsError(
                f"{name} would take {amount(taken)} and the memory plan grants {amount(self.granted.get(name, 0))}; "
                "give a larger memory budget."
            )
        self.taken[name] = taken

    @property
    def total(self) -> int:
        """What is taken of host memory now, libraries included as far as they are paged in."""
        taken = sum(nbytes for name, nbytes in self.taken.items() if name not in self._on_device)
        return taken + max(0, mapped_bytes() - self._mapped)

    def holder(self, name: str) -> Callable[[int], None]:
        """Something that charges what it is told to `name`."""
        return partial(self.charge, name)

    def lines(self) -> list[str]:
        """The ledger as a table: granted and, where an allocation was charged, taken; bytes of the stream; the process as it is now."""
        plan = self.plan
        limit = "no limit" if plan.budget_bytes is None else f"{amount(plan.budget_bytes)} for {scope(plan.covers)}"
        rows = [("memory budget", limit, "")]
        for name, nbytes in (*plan.charges, *plan.device_charges):
            label = f"{name}, device" if name in self._on_device else name
            rows.append((label, amount(nbytes), amount(self.taken[name]) if name in self.taken else ""))
        rows.append(("granted in all", amount(plan.charged), ""))
        rows.append(("streamed per target pass", amount(plan.streamed_bytes), ""))
        if plan.streamed:
            rows.append(("streams per prompt", "1" if plan.holds_sublayers else f"1 every {PREFILL_ROWS} tokens", ""))
        rows.append(("taken in all", "", amount(self.total)))
        rows.append(("the process holds now", "", amount(int(psutil.Process().memory_info().rss))))
        return aligned(rows)


def scope(covers: str) -> str:
    """What a budget counts, in words."""
    return "the whole process" if covers == "process" else "the weights only"


def aligned(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Rows of a table, columns padded to one width."""
    first, second = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    return [f"{name:<{first}}  {granted:>{second}}  {taken}".rstrip() for name, granted, taken in rows]
