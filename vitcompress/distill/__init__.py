"""Train the student: losses, teachers, the training loop and its checkpoints."""
