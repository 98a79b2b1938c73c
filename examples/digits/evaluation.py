"""Accuracies of a model, and its similarity to the pretrained one."""

from __future__ import annotations

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import rift_kernels as rk

from .data import Data, Images
from .model import Transformer
from .runs import Run


@torch.no_grad()
def evaluate(model: Transformer, teacher: Transformer, data: Data) -> Run:
    """Accuracies in percent, and similarities to the teacher."""

    def similarity(images: Tensor) -> float:
        return rk.linear_cka(model.features(images), teacher.features(images)).item()

    return {
        "new_accuracy": accuracy(model, data.new_test),
        "similarity": similarity(data.old_test[0]),
        "similarity_new": similarity(data.new_test[0]),
        "old_accuracy": refitted_accuracy(model, data.pretraining, data.old_test),
    }


@torch.no_grad()
def accuracy(model: Transformer, images: Images, head: nn.Linear | None = None) -> float:
    """Percentage of images classified correctly by the model's head or another one."""
    head = model.head if head is None else head
    hits = head(model.features(images[0])).argmax(1) == images[1]
    return 100 * hits.float().mean().item()


@torch.no_grad()
def refitted_accuracy(model: Transformer, training: Images, test: Images) -> float:
    """The accuracy of a linear classifier fitted to the model's features of ``training``."""
    training_features, test_features = (
        model.features(pixels).cpu().numpy() for pixels, _ in (training, test)
    )
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(training_features, training[1].cpu().numpy())
    return 100 * float(probe.score(test_features, test[1].cpu().numpy()))
