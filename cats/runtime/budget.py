"""The ledger of a memory budget: what each part was granted, what it has taken. It refuses; it never warns."""

from collections.abc import Sequence

import psutil

from cats.errors import CatsError
from cats.planning.plan import PREFILL_ROWS, MemoryPlan, amount

GROWTH = 96_000_000
"""Bytes granted to the interpreter beyond what it holds before loading: threads, work spaces of matrix libraries, code paged in later."""


def interpreter_bytes() -> int:
    """What this process holds now, libraries included, and what it will still grow by itself."""
    return int(psutil.Process().memory_info().rss) + GROWTH


class Ledger:
    """Grants by name, from a plan, and what was taken of each."""

    def __init__(self, plan: MemoryPlan):
        self.plan = plan
        self.granted = dict(plan.charges)
        self.taken: dict[str, int] = {}

    def charge(self, name: str, nbytes: int) -> None:
        """Take `nbytes` of what `name` was granted; raises `CatsError` where that is exceeded."""
        taken = self.taken.get(name, 0) + nbytes
        if self.plan.budget_bytes is not None and taken > self.granted.get(name, 0):
            raise CatsError(
                f"{name} would take {amount(taken)} and the memory plan grants {amount(self.granted.get(name, 0))}; raise --memory-budget."
            )
        self.taken[name] = taken

    def lines(self) -> list[str]:
        """The ledger as a table: granted and, where an allocation was charged, taken; bytes of the stream; the process as it is now."""
        plan = self.plan
        limit = "no limit" if plan.budget_bytes is None else f"{amount(plan.budget_bytes)} for {scope(plan.covers)}"
        rows = [("memory budget", limit, "")]
        rows += [(name, amount(nbytes), amount(self.taken[name]) if name in self.taken else "") for name, nbytes in plan.charges]
        rows.append(("granted in all", amount(plan.charged), ""))
        rows.append(("streamed per target pass", amount(plan.streamed_bytes), ""))
        if plan.streamed:
            rows.append(("streams per prompt", "1" if plan.holds_sublayers else f"1 every {PREFILL_ROWS} tokens", ""))
        memory = psutil.Process().memory_info()
        rows.append(("the process holds now", amount(int(memory.rss)), ""))
        return aligned(rows)


def scope(covers: str) -> str:
    """What a budget counts, in words."""
    return "the whole process" if covers == "process" else "the weights only"


def aligned(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Rows of a table, columns padded to one width."""
    first, second = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    return [f"{name:<{first}}  {granted:>{second}}  {taken}".rstrip() for name, granted, taken in rows]
