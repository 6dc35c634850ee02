"""Commands that prepare data: each a thin command over functions."""
