"""`mmssl demo`: search, localization and a map of the corpus in the browser."""
