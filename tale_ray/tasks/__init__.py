"""What is asked: task files, rows, prompts, answers, splits. Knows nothing of models or of the search."""
