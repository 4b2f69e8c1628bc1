"""Adds one file to the wheel that setup.cfg cannot express: the .pth that Python reads at every start."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PTH = "ad_flashinfer_pass_autodeploy.pth"
# Costs nothing where the variable is not set; does not break Python where the package is gone.
LINE = (
    "import os, importlib.util as u; os.environ.get('FLASHINFER_TRTLLM_AUTODEPLOY') "
    "and u.find_spec('ad_flashinfer_pass') "
    "and __import__('ad_flashinfer_pass.autodeploy_hook').autodeploy_hook.install()\n"
)


class BuildPyWithPth(build_py):
    """Writes the file beside the packages; of an editable install, beside its own .pth."""

    def run(self) -> None:
        """Build, then add the file."""
        super().run()
        root = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        path = Path(root, PTH)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(LINE, encoding="utf-8")


setup(cmdclass={"build_py": BuildPyWithPth})
