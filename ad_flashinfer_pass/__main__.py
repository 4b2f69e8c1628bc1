"""``python -m ad_flashinfer_pass``: the command ``ad-flashinfer-pass``."""

from ad_flashinfer_pass.cli import main

if __name__ == "__main__":
    main()
