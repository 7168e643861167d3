"""What users start: `python -m launch.generate` and `python -m launch.demo`."""
