"""What all Hugging Face model folders have in common; each architecture's own fields and keys are in its file."""
