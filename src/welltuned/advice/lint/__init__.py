"""Lint: checks of a fine-tuning configuration, whichever tool it was written for."""

from welltuned.advice.lint import adapters, course, keys, numerics, preference, rates, schedule, text
from welltuned.advice.lint.check import CHECKS, Check, Finding, Severity, findings_of
from welltuned.advice.lint.config import Config, Tool

FAMILIES = {
    "Learning rate": rates,
    "Schedule": schedule,
    "Adapter": adapters,
    "Course of the run": course,
    "What is trained on": text,
    "Numbers": numerics,
    "Preference and reinforcement learning": preference,
    "Keys and values": keys,
}
"""The checks' modules by the heading under which the documentation lists them."""

__all__ = ["CHECKS", "FAMILIES", "Check", "Config", "Finding", "Severity", "Tool", "findings_of"]
