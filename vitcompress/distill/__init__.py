"""What the student learns, from whom, and how."""
