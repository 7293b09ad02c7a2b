"""Conventions of other libraries, at the edge: nothing else here needs them."""
