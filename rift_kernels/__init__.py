"""RIFT losses preserve a pretrained representation in finetuning. See README.md and DESIGN.md."""

from . import reference
from ._version import __version__
from .commands.info import backend_report
from .dispatch.second_moments import SecondMoments
from .features.capture import FeatureCapture
from .features.collect import collect_teacher_statistics
from .features.statistics import TeacherStatistics, load_statistics, save_statistics
from .functional import (
    bures_distance,
    covariance_distance,
    cross_covariance,
    linear_cka,
    procrustes_similarity,
    second_moments,
)
from .losses import RIFTLoss
from .regularizer import RIFTRegularizer
from .weighting import AdaptiveWeight

__all__ = [
    "AdaptiveWeight",
    "FeatureCapture",
    "RIFTLoss",
    "RIFTRegularizer",
    "SecondMoments",
    "TeacherStatistics",
    "__version__",
    "backend_report",
    "bures_distance",
    "collect_teacher_statistics",
    "covariance_distance",
    "cross_covariance",
    "linear_cka",
    "load_statistics",
    "procrustes_similarity",
    "reference",
    "save_statistics",
    "second_moments",
]
