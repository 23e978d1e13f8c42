"""The verb `check`: what is wrong with the normalization in a model, and how to mend it."""

from batchnorm.check.checking import check as check
from batchnorm.check.mended import Mended as Mended
from batchnorm.check.report import Finding as Finding
from batchnorm.check.report import NotRun as NotRun
from batchnorm.check.report import Report as Report
from batchnorm.check.rules import RULES as RULES
from batchnorm.check.rules import Rule as Rule

__all__ = ["RULES", "Finding", "Mended", "NotRun", "Report", "Rule", "check"]
