"""Metrics by name, as a recipe's `eval.metrics` lists them."""

from fastgen.metrics.accuracy import Accuracy
from fastgen.metrics.base import Direction, Metric, MetricContext, Timing
from fastgen.metrics.diversity import Diversity
from fastgen.metrics.drift import Drift
from fastgen.metrics.energy_distance import EnergyDistance
from fastgen.metrics.fid import FID
from fastgen.metrics.frames import LagError, VarianceError
from fastgen.metrics.mode_share import ModeShare
from fastgen.metrics.moments import CovError, MeanError
from fastgen.metrics.motion_error import MotionError
from fastgen.metrics.precision_recall import PrecisionRecall
from fastgen.metrics.reward import REWARD_METRICS
from fastgen.metrics.throughput import Throughput
from fastgen.metrics.video_accuracy import VideoAccuracy

METRICS: dict[str, type[Metric]] = {
    "fid": FID,
    "accuracy": Accuracy,
    "diversity": Diversity,
    "precision_recall": PrecisionRecall,
    "energy_distance": EnergyDistance,
    "mean_error": MeanError,
    "cov_error": CovError,
    "mode_share_error": ModeShare,
    "video_accuracy": VideoAccuracy,
    "motion_error": MotionError,
    "drift": Drift,
    "variance_error": VarianceError,
    "lag_error": LagError,
    "throughput": Throughput,
    **REWARD_METRICS,
}

# Whether lower or higher is better, for every number that the metrics return.
DIRECTIONS: dict[str, Direction] = {key: d for metric in METRICS.values() for key, d in metric.directions.items()}

__all__ = ["DIRECTIONS", "METRICS", "Direction", "Metric", "MetricContext", "Timing"]
