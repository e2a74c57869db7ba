"""How far a figure would move with other text: the bootstrap over windows (Efron 1979, the percentile interval).

The windows that were scored are drawn again, with replacement, as many as there are, and the figure is computed anew;
the interval holds the middle 95 % of 1,000 such figures. Windows and not tokens are drawn, as the tokens of one text
are alike. What two models made of the same windows is drawn together, so that easy and hard windows cancel out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RESAMPLES = 1_000
COVERAGE = 0.95
Interval = tuple[float, float]


def interval(figure: Callable[[Tensor], Tensor], windows: int) -> Interval:
    """``figure`` takes the numbers of drawn windows, [windows], and gives the figure, []. The seed is fixed."""
    drawn = torch.randint(windows, (RESAMPLES, windows), generator=torch.Generator().manual_seed(0))
    figures = torch.stack([figure(row) for row in drawn]).double()
    tail = (1 - COVERAGE) / 2
    low, high = figures.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
