"""Makes a run: data, model, adapters, loop, capture, meters, folder."""
