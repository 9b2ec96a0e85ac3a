"""From a trained model to an inherited one: plan, convert, verify, summarise."""

from .batchnorm import reestimate_batchnorm
from .conversion import inherit
from .layers import LayerPlan
from .overview import LayerSummary, Summary, summary
from .planning import plan
from .plans import Plan, weights_hash
from .verification import OutputReport, Report, verify

__all__ = [
    "LayerPlan",
    "LayerSummary",
    "OutputReport",
    "Plan",
    "Report",
    "Summary",
    "inherit",
    "plan",
    "reestimate_batchnorm",
    "summary",
    "verify",
    "weights_hash",
]
