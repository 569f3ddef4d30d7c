"""Masks that depend on the queries and keys of a call: a score for each pair of blocks, and a
budget that says how many of the best are kept.
"""

from attn_control.masks.selectors.budgets import (
    Budget,
    PerHead,
    PerRegion,
    Threshold,
    TopK,
    TopP,
)
from attn_control.masks.selectors.clusters import Clustered, cluster_order, select_clusters
from attn_control.masks.selectors.scores import (
    Blocks,
    Sampled,
    Score,
    exact_pooled,
    mean_pooled,
    min_max_bound,
)
from attn_control.masks.selectors.select import select_blocks

__all__ = [
    "Blocks",
    "Budget",
    "Clustered",
    "PerHead",
    "PerRegion",
    "Sampled",
    "Score",
    "Threshold",
    "TopK",
    "TopP",
    "cluster_order",
    "exact_pooled",
    "mean_pooled",
    "min_max_bound",
    "select_blocks",
    "select_clusters",
]
