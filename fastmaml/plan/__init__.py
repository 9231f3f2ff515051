"""Program + Arrangement -> Plan. All knowledge of meta-learning stands above this line, all knowledge of hardware below it."""

from fastmaml.plan.arrangement import Arrangement, Rate
from fastmaml.plan.instructions import Buffer, Group, Instruction, Phase, Plan, Reduction, Ref, Segment
from fastmaml.plan.sweep import build_plan

__all__ = [
    "Arrangement",
    "Buffer",
    "Group",
    "Instruction",
    "Phase",
    "Plan",
    "Rate",
    "Reduction",
    "Ref",
    "Segment",
    "build_plan",
]
