"""From a network to images: plans (solver tables), the denoiser, batches and in-flight rows."""
