"""The machinery of ``masks.prove``; docs/mask_prover.md has the argument for its soundness."""

from ad_flashinfer_pass.masks.prove import HIDDEN, Certificate, MaskClass, fingerprint, prove

__all__ = ["HIDDEN", "Certificate", "MaskClass", "fingerprint", "prove"]
