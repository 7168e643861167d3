"""The per-patch diffusion: path and parameterisations (path), network (head), objective (flow), sampling (sampler, guidance)."""
