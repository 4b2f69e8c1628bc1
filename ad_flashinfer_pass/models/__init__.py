"""Where models come from: HF directories and ids, config.json alone, and the demo."""

import transformers
from packaging.version import Version

from ad_flashinfer_pass.errors import ConfigError

OLDEST_TRANSFORMERS = "5.17"
"""Of all that loads and exports models; setup.cfg asks for less, for TensorRT-LLM pins an older one."""

if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
    raise ConfigError(
        f"transformers {transformers.__version__} is installed, {OLDEST_TRANSFORMERS} or newer is needed: "
        f"pip install 'transformers>={OLDEST_TRANSFORMERS},<6'. Beside TensorRT-LLM only the plugin runs."
    )
