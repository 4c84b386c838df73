"""The commands as functions, one module each; only these modules combine the other packages."""
