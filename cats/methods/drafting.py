"""Settings that methods which draft with an adapter share, and what holds of several of them together."""

from cats.config import require

STEPS = {"help": "tokens drafted in a round", "lowest": 1}
THRESHOLD = {"help": "from the second step on, drafting stops when the best probability falls below this; 0 never stops"}
TREE_TOPK = {"help": "1 is a chain; above, candidates per drafted token", "lowest": 1, "highest": 1000}
TOTAL_TOKENS = {"help": "nodes of the tree, root included; -1 sizes it to steps * tree-topk + 1"}


def check_threshold(threshold: float) -> None:
    """Raise `CatsError` unless it can be a threshold."""
    require(0 <= threshold < 1, f"threshold is {threshold}; it is a probability below 1.")


def check_tree(tree_topk: int, total_tokens: int) -> None:
    """Raise `CatsError` where the size of a tree cannot be meant."""
    require(total_tokens == -1 or total_tokens >= 2, f"total-tokens is {total_tokens}; it must be -1 (automatic) or at least 2.")
    require(
        tree_topk > 1 or total_tokens == -1,
        f"total-tokens {total_tokens} has nothing to choose from in a chain; use tree-topk above 1, or total-tokens -1.",
    )
