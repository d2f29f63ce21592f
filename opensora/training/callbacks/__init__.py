from opensora.training.callbacks.base import Callback
from opensora.training.callbacks.housekeeping import Checkpoints, GarbageCollection
from opensora.training.callbacks.metrics import CutCaptions, MetricsFile, RejectedSamples, TensorBoard, WeightsAndBiases
from opensora.training.callbacks.progress import Progress

__all__ = [
    "Callback",
    "Checkpoints",
    "CutCaptions",
    "GarbageCollection",
    "MetricsFile",
    "Progress",
    "RejectedSamples",
    "TensorBoard",
    "WeightsAndBiases",
]
