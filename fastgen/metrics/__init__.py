"""Metrics by name, as a recipe's `eval.metrics` lists them."""

from fastgen import registry
from fastgen.metrics.base import Direction, Metric, MetricContext, Timing

METRICS: dict[str, type[Metric]] = {name: registry.imported(path) for name, path in registry.METRICS.items()}

# Whether lower or higher is better, for every number that the metrics return.
DIRECTIONS: dict[str, Direction] = {key: d for metric in METRICS.values() for key, d in metric.directions.items()}

__all__ = ["DIRECTIONS", "METRICS", "Direction", "Metric", "MetricContext", "Timing"]
