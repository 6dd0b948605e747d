"""Teachers from other libraries: a file a source, and what they share.

Each source's `read` gives a `model.Imported`. Shapes prove little: a wrong order of q, k, v or another ε loads just as
well. So every setting of a source is read by name or refused (`account.Settings`), every tensor used or dropped for a
reason (`account.Tensors`), and the result compared with the source's own outputs (`compare`).
"""
