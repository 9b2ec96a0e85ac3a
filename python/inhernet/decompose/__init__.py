"""From a trained model to an inherited one: plan, convert, verify, summarise."""

from .batchnorm import reestimate_batchnorm
from .conversion import inherit
from .layers import LayerPlan
from .overview import LayerSummary, Summary, summary
from .planning import plan
from .plans import Plan, weights_hash
from .refine import BlockReport, Refinement, refine_blocks
from .verification import OutputReport, Report, verify

__all__ = [
    "BlockReport",
    "LayerPlan",
    "LayerSummary",
    "OutputReport",
    "Plan",
    "Refinement",
    "Report",
    "Summary",
    "inherit",
    "plan",
    "reestimate_batchnorm",
    "refine_blocks",
    "summary",
    "verify",
    "weights_hash",
]
