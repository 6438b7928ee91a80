"""What to remove: strategies, the scheduler of rounds, the driver. Imports neither torch nor ray."""
