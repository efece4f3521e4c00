"""Callbacks for the algorithms of this package; some work with any algorithm of SB3."""

from sb3_async1step.callbacks.background_eval import BackgroundEvalCallback
from sb3_async1step.callbacks.histograms import HistogramCallback

__all__ = ["BackgroundEvalCallback", "HistogramCallback"]
