"""Two models on disk: read one tensor at a time, what differs between them, and a LoRA cut out of that."""
