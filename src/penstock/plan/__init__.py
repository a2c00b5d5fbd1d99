"""What is decided before a run."""

from penstock.plan.plan import Borders, Plan

__all__ = ["Borders", "Plan"]
