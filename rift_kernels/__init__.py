"""RIFT losses: keep a pretrained representation while finetuning. See README.md and DESIGN.md."""

from . import reference
from ._version import __version__
from .capture import FeatureCapture
from .collect import collect_teacher_statistics
from .dispatch import backend_report
from .functional import (
    SecondMoments,
    bures_distance,
    covariance_distance,
    cross_covariance,
    linear_cka,
    procrustes_similarity,
    second_moments,
)
from .losses import RIFTLoss
from .statistics import TeacherStatistics, load_statistics, save_statistics

__all__ = [
    "FeatureCapture",
    "RIFTLoss",
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
