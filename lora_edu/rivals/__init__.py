"""What else one could do: bottleneck adapters, prefix and prompt tuning, biases; and the table of all methods."""
