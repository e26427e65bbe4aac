"""Training on Lightning: one recipe, one module, one loop."""
