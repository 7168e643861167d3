"""Documents in, packed rows out, as NumPy arrays. Knows no model and no ranks. See docs/data-format.md."""
