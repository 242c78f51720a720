"""The training loop, its optimizer, schedule and metrics."""
