from opensora.training.callbacks.base import Callback
from opensora.training.callbacks.evaluation import EvaluationFile, Evaluations
from opensora.training.callbacks.guard import UpdateGuard
from opensora.training.callbacks.housekeeping import Checkpoints, GarbageCollection
from opensora.training.callbacks.layout import Layout
from opensora.training.callbacks.metrics import CutCaptions, MetricsFile, RejectedSamples, TensorBoard, WeightsAndBiases
from opensora.training.callbacks.progress import Progress
from opensora.training.callbacks.requests import Requests
from opensora.training.callbacks.watchdog import Watchdog

__all__ = [
    "Callback",
    "Checkpoints",
    "CutCaptions",
    "EvaluationFile",
    "Evaluations",
    "GarbageCollection",
    "Layout",
    "MetricsFile",
    "Progress",
    "RejectedSamples",
    "Requests",
    "TensorBoard",
    "UpdateGuard",
    "Watchdog",
    "WeightsAndBiases",
]
