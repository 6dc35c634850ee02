"""Training: one loop, one engine (DeepSpeed), checkpoints that resume exactly."""
