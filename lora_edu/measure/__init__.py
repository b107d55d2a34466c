"""How we know: spectra of updates, and what training on nothing leaves behind."""
