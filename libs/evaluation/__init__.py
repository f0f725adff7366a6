"""Quality, cost and seconds of ways to sample, from the same seeds."""
