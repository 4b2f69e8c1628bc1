"""Looking at what the pass did: the functions of the commands, under their names, which return typed data.

from ad_flashinfer_pass import AutoDeployConfig, inspection

found = inspection.lint(AutoDeployConfig(model="demo"), sm=90)
"""

# Imported here and now: the module of a function has its name, and would be found in its place.
from ad_flashinfer_pass.inspection.check.check import check
from ad_flashinfer_pass.inspection.diff import diff
from ad_flashinfer_pass.inspection.dump import dump
from ad_flashinfer_pass.inspection.explain import explain
from ad_flashinfer_pass.inspection.lint import lint
from ad_flashinfer_pass.inspection.plan import plan
from ad_flashinfer_pass.inspection.report import report

__all__ = ["check", "diff", "dump", "explain", "lint", "plan", "report"]
