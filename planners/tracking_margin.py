"""What plans keep from barriers because robots stray from them, derived from what one's planner was measured to make them stray.

A margin that held every error would close passages that robots can take: in the large maze one error in a hundred is above 0.18 m,
which is what the published hazards leave. So plans hold the error of `SHARE` of the steps, and a filter of the action the rest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offline.fitted import fitted_file, load_fitted

SHARE = 0.7
UNMEASURED = 0.05  # metres


def measured(metres: np.ndarray) -> dict[str, Tensor]:
    """What is kept of tracking errors: "quantiles" (101,), metres, of 0, 1, .. 100 % of the steps."""
    return {"quantiles": torch.as_tensor(np.quantile(metres, np.linspace(0, 1, 101)))}


def tracking_margin(origin: tuple[Path, str] | None) -> float:
    """Metres, to the centimetre, that hold the tracking error of `SHARE` of the steps, as `pilotwave fit RUN what=tracking`
    measured it and keeps it beside a run's weights (the folder and their sha256); `UNMEASURED` where it did not."""
    if origin is None or not fitted_file(origin[0], "tracking", {}).exists():
        return UNMEASURED
    quantiles = load_fitted(origin, "tracking", {})["quantiles"].numpy()
    return round(float(np.interp(SHARE, np.linspace(0, 1, len(quantiles)), quantiles)), 2)
