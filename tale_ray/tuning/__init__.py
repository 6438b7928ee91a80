"""What is trained: low-rank adapters on a task's rows, on a full model or on one without some of its layers."""
