"""Every branch of every scoring rule, on hand-made items in the real formats."""
