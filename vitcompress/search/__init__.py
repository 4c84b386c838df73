"""Which plan is best for a target?  See `search`."""
