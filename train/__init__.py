"""Training: the only place that knows both the model and the data. `python -m train --config FILE` starts a run."""
