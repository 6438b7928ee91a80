"""How it is scored: candidates times rows on one loaded model. Knows nothing of rounds, workers or storage."""
