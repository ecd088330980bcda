"""`tubelet compare` for generators: one prompt and seed, dense against each recipe."""
