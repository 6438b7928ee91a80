"""What comes of a run: its summary, as tables and as JSON. Reads the store, writes nothing."""
