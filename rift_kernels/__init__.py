"""RIFT losses: keep a pretrained representation while finetuning. See README.md and DESIGN.md."""

from . import reference
from ._version import __version__
from .capture import FeatureCapture
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

__all__ = [
    "FeatureCapture",
    "RIFTLoss",
    "SecondMoments",
    "__version__",
    "backend_report",
    "bures_distance",
    "covariance_distance",
    "cross_covariance",
    "linear_cka",
    "procrustes_similarity",
    "reference",
    "second_moments",
]
