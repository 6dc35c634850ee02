"""From shard bytes to batches: verify, decode on one clock, cut views, collate, and the loader."""
