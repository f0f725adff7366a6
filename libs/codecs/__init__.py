"""Between images and what a network denoises, and from prompts to the contexts of text-to-image networks."""

from libs.codecs.clip_text import ClipText
from libs.codecs.identity import Identity, to_uint8
from libs.codecs.kl import KL
