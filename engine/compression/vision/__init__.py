"""Which tokens of an image the language model reads."""
