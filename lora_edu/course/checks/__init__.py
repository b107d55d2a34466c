"""The checkers of the exercises, one file a notebook. Reading them tells you the answers."""
