"""A fine-tuned model as it is served, in several ways: built, compared, timed."""
