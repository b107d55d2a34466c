"""What is adapted: a LLaMA that reads in one sitting, and the checkpoint that comes with the package."""
