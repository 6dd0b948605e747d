"""fastdiff: guided diffusion models distilled into generators that need 8, 4, 2 or 1 network calls."""

__version__ = "0.1.0"
