"""A run as one page for people: what was found, whether it holds, what it took. Reads the store, writes nothing."""
