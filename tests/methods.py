"""Every method in every shape that the tests run: a method that is added to `cats.METHODS` must be given a shape here."""

from cats.config import AutoregressiveConfig, CascadeConfig, EagleSelfConfig, KangarooConfig, MethodConfig, PromptLookupConfig

SHAPES: dict[str, MethodConfig] = {
    "autoregressive": AutoregressiveConfig(),
    "cascade-chain": CascadeConfig(steps=5),
    "cascade-tree": CascadeConfig(steps=5, tree_topk=4, total_tokens=24),
    "cascade-tree-automatic": CascadeConfig(steps=3, tree_topk=3),
    "cascade-threshold": CascadeConfig(steps=5, threshold=0.5, tree_topk=2),
    "cascade-rounds": CascadeConfig(steps=2, tree_topk=2, sv_passes=3),
    "cascade-branches": CascadeConfig(steps=3, tree_topk=3, total_tokens=24, branch_rounds=3),
    "kangaroo": KangarooConfig(steps=6, threshold=0.3),
    "eagle-chain": EagleSelfConfig(steps=4),
    "eagle-tree": EagleSelfConfig(steps=4, tree_topk=4, total_tokens=16),
    "prompt-lookup": PromptLookupConfig(max_ngram=2, continuation=5),
}
