"""Measuring compressed models: tasks, fidelity to the base model, size and speed, and the report that shows them."""
