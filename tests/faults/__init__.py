"""Faults done to real trainers, brokers and disks."""

import os

from tests.faults import brokers, refusals, stores
from tests.faults.case import CASES, S3_SCRIPT, Case, Ground

if S3_SCRIPT in os.environ:
    from tests.faults import object_stores  # noqa: F401 - it notes its cases

__all__ = ["CASES", "Case", "Ground", "brokers", "refusals", "stores"]
