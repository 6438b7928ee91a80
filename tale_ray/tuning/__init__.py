"""What is trained: adapters of low rank on a task's rows, on a full model or on one without some of its layers."""
