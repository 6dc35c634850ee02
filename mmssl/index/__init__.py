"""Corpora as vectors in a searchable table: `mmssl embed`, `mmssl index` and `mmssl search`."""
