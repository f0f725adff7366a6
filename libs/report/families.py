"""Families of evaluated points, by what they may claim: read without torch."""

# All layers at every call that is made: fewer calls, better placed ones, another solver. The rival of every speed-up.
PLAIN = ("full", "steps", "plain", "sampler")
# Copies of another policy's depths that do not look at the images: they need that policy.
CONTROLS = ("matched_random", "matched_static")
# What early exit is held against, and never recommended itself: nothing is decided, features are reused, or copied.
LOOKING_BACK = ("reuse", "cache", "forecast", "first_block", "teacache", "learned_cache", "lazy_gate")
BASELINES = (*PLAIN, "fixed", *LOOKING_BACK, "duo", *CONTROLS)
