"""The diffusion of a patch: path and predictions (path), network (head), objective (flow), sampler and guidance."""
