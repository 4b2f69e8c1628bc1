"""Every error that this package raises on purpose.

::

    AdFlashinferError
    |-- ConfigError          a setting is unknown, out of range or in conflict (exit code 2)
    |-- LoadError            a model, tokenizer or checkpoint cannot be read
    |-- TransformError       the pass refuses a graph
    |   |-- ExportError          torch.export could not make a graph of the model
    |   |-- NoAttentionError     no attention site was found
    |   |-- MaskError            a mask is none of the classes that a kernel can run
    |   |-- PackingError         an op outside attention mixes tokens
    |   `-- UnsupportedError     no kernel can do what a site needs (the no-drop ledger)
    |-- KernelError          a kernel's library cannot be loaded, or fails
    |-- CapacityError        pages or memory cannot hold what was asked for
    |-- RequestError         one request is refused; the others go on
    |-- SessionError         a compiled model or its session is used out of order
    `-- RankError            the ranks of a model have lost each other

A message says what must hold, what was found, and what to do, on one line.
"""

import re
from typing import Any


class AdFlashinferError(Exception):
    """Base of all errors of this package."""


class ConfigError(AdFlashinferError, ValueError):
    """A setting is unknown, out of range or in conflict with another."""


class LoadError(AdFlashinferError):
    """A model, tokenizer or checkpoint cannot be read."""


class TransformError(AdFlashinferError):
    """The pass refuses a graph; the message names the node and its source line.

    Args:
        message: on one line.
        node: the ``fx.Node`` that it is about, for those that show more of it.
        picture: lines that show what the message says.
    """

    def __init__(self, message: str, *, node: Any = None, picture: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.node, self.picture = node, picture
        self.transform = ""
        """That refused; set by the pipeline."""
        self.reports: list[Any] = []
        """Of the transforms before it; set by the pipeline."""


class ExportError(TransformError):
    """torch.export could not make a graph of the model."""


class NoAttentionError(TransformError):
    """No attention site was found in the graph."""


class MaskError(TransformError):
    """An attention mask is none of the classes that a kernel can run."""


class PackingError(TransformError):
    """An op outside attention mixes tokens, so sequences cannot share a packed batch."""


class UnsupportedError(TransformError):
    """No kernel can do what an attention site needs."""


class KernelError(AdFlashinferError):
    """A kernel's library cannot be loaded, or a call of it fails."""


class CapacityError(AdFlashinferError):
    """Pages or memory cannot hold what was asked for."""


class RequestError(AdFlashinferError, ValueError):
    """One request is refused; the message says why. Other requests are not affected."""


class SessionError(AdFlashinferError, RuntimeError):
    """A compiled model or its session is used out of order; nothing ran and nothing changed."""


class RankError(AdFlashinferError, RuntimeError):
    """The ranks of a model have lost each other; it must be built again."""


def is_out_of_memory(err: BaseException) -> bool:
    """Whether an error of torch, safetensors or Python says that memory does not suffice."""
    return isinstance(err, MemoryError) or bool(re.search("(?i)out of memory|allocate memory", str(err)))


def is_panic(err: BaseException) -> bool:
    """Whether this is a panic of Rust, as of tokenizers: no Exception, and its class cannot be imported."""
    return type(err).__name__ == "PanicException"
