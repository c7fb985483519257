"""Stand-ins that behave like the servers and workers they replace."""
