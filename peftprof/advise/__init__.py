"""What a run will take, before it is run: memory by tracing one step without data, and time."""
