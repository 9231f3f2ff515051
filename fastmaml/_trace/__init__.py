"""How ``fastmaml.trace`` reads a forward: a recorder of torch functions, and one rule per function."""
