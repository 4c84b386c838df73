"""Other people's models: what a name means, and how their weights are read."""
