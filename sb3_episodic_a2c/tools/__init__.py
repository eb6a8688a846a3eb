"""Tools on top of the public names, one job each. Nothing in the package imports them but the command line."""
