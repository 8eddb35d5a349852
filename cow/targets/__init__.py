"""The targets: a module each, named as the type with "-" written "_"."""
