"""Weight files of all known kinds, and the training state that a resumed run needs."""
