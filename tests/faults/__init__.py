"""Faults done to real trainers, brokers and disks."""

from tests.faults import brokers, refusals, stores
from tests.faults.case import CASES, Case, Ground

__all__ = ["CASES", "Case", "Ground", "brokers", "refusals", "stores"]
