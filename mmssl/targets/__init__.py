"""What masked tasks predict, and where labels of other stages come from."""
