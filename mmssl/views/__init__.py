"""Views: named cuts of a clip, planned from its header, augmented with generators of their own."""
