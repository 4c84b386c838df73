"""What stands in a block where a layer was, or beside it."""
