"""fastdiff: any diffusion or flow sampler compiled to one table, run by one fused kernel."""
