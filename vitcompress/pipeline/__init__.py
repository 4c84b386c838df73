"""What is done for a user, from the recipe to the report: where the stages meet."""
