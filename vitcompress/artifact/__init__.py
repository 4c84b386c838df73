"""Write, verify, read and load compressed models."""
