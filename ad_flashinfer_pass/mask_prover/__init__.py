"""The machinery of ``masks.prove``; docs/mask_prover.md has the argument for its soundness."""
