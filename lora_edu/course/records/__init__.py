"""Long experiments: how they are made (`python -m lora_edu.record NAME`), and what came out, as JSON."""
