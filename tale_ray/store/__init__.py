"""What is remembered: one run, one folder. Imports neither torch nor ray."""
