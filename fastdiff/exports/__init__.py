"""Generators for others to serve: a file a format, and what they share.

What is exported is `generator.Generator`, the whole sampler as one function of tensors. Each format's `write` puts it
into a folder, and its `read` makes a function of what is there, which `compare` holds against our own images before
the folder takes its place.
"""
