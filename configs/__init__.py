"""The YAML configs, read as ``ad_flashinfer_pass.configs`` with importlib.resources."""
