"""What a model is trained to predict, and what makes it."""
