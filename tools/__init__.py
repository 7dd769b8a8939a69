"""Scripts that the Makefile calls; the package does not import them."""
