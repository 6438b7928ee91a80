"""Where it runs: the executors and their worker. The only room that imports ray."""
