"""Generation: caches, sampling and the engine."""
