"""Finding a table for a denoiser: by hand-made ones, evolution, a predictor, and gradients."""

from diffusion.search.bespoke import bespoke
from diffusion.search.candidate import Candidate
from diffusion.search.evolutionary import evolve
from diffusion.search.predictor import predict_and_try
from diffusion.search.problem import Problem
from diffusion.search.tune import Tuned, hand_made, tune

__all__ = ["Candidate", "Problem", "Tuned", "bespoke", "evolve", "hand_made", "predict_and_try", "tune"]
