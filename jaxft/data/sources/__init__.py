"""Sources: the places that texts and pictures come from, one table of schemes."""
