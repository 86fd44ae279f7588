"""Guidance: samples that follow p(x) exp(r(x)) rather than p(x), through the hooks of `diffusion.sample`. One file a family."""

from diffusion.guidance.classifier import Classifier
from diffusion.guidance.classifier_free import ClassifierFree
from diffusion.guidance.training_free import METHODS, Settings, TrainingFree, search

__all__ = ["METHODS", "Classifier", "ClassifierFree", "Settings", "TrainingFree", "search"]
