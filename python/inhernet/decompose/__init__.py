"""From a trained model to an inherited one: plan, convert, verify, summarise."""

from .batchnorm import reestimate_batchnorm
from .conversion import inherit
from .elastic_network import elastic
from .layers import LayerPlan
from .levels import Levels, at_level, cut, set_level
from .overview import LayerSummary, Summary, summary
from .planning import plan
from .plans import Plan, weights_hash
from .refine import BlockReport, Refinement, refine_blocks
from .restoring import restore
from .verification import OutputReport, Report, verify

__all__ = [
    "BlockReport",
    "LayerPlan",
    "LayerSummary",
    "Levels",
    "OutputReport",
    "Plan",
    "Refinement",
    "Report",
    "Summary",
    "at_level",
    "cut",
    "elastic",
    "inherit",
    "plan",
    "reestimate_batchnorm",
    "refine_blocks",
    "restore",
    "set_level",
    "summary",
    "verify",
    "weights_hash",
]
