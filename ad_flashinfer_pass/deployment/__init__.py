"""Before and beside a run: bench, calibrate, doctor, migrate, prebuild, quantize."""
