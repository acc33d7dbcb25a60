"""Structured pruning of trained networks: neuron graphs, spectra, a plan, a smaller checkpoint."""
