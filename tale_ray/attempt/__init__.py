"""One attempt at a run, from options to result: rows, run folder, workers, driver, in the order of their cost."""
