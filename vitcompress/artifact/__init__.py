"""The artifact: what is in the file, where it lies, and which of it is believed."""
