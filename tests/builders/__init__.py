"""Build the sweeps, runs and namespaces that many tests start from."""
