"""One file per benchmark: what it prints, and its table in README."""
