"""Statistics of evaluations: intervals, tests and power for scores between 0 and 1, on the same items for two models.

    from whet.evals import statistics
    statistics.paired_difference(candidate, baseline)      Interval(estimate=0.06, low=0.012, high=0.108, ...)

Everything is numpy and scipy.special, takes no global random state, and gives the same numbers for the same input.
How often the intervals hold the truth is measured by bench/gate_simulation.py.
"""

from whet.evals.statistics.interval import Interval
from whet.evals.statistics.means import mean, over_seeds, proportion, ratio
from whet.evals.statistics.paired import paired_bootstrap, paired_difference
from whet.evals.statistics.power import describe_power, detectable_gain, power_of_gain, sample_size
from whet.evals.statistics.tests import excess_p, holm, mcnemar

__all__ = [
    "Interval",
    "describe_power",
    "detectable_gain",
    "excess_p",
    "holm",
    "mcnemar",
    "mean",
    "over_seeds",
    "paired_bootstrap",
    "paired_difference",
    "power_of_gain",
    "proportion",
    "ratio",
    "sample_size",
]
