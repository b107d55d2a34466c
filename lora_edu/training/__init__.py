"""How it learns: texts, tasks, and the one training loop."""
